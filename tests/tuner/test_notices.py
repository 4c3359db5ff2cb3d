"""What a search tells of what it leaves out."""

from autoquant.records import LinearShape, Site
from autoquant.tuner.choices import SiteChoices
from autoquant.tuner.notices import dropped_notices


def choices(name, **dropped):
    shape = LinearShape(n=8, k=8, bias=False, dtype="bfloat16")
    return SiteChoices(Site(name=name, parameters=(), shape=shape, uses=()), (), dropped)


def test_formats_left_out_of_as_many_layers_for_one_reason_share_a_line():
    found = list(
        dropped_notices(
            [
                choices("a", int4="needs a GPU", mslk="needs a GPU", float8="slower"),
                choices("b", int4="needs a GPU", mslk="needs a GPU", float8="no fit"),
            ]
        )
    )
    assert found == [
        "int4, mslk not considered for 2 of 2 layers: needs a GPU",
        "float8 not considered for 1 of 2 layers: slower",
        "float8 not considered for 1 of 2 layers: no fit",
    ]
