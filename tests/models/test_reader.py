"""Inputs made from texts, pictures and sounds."""

import numpy as np
import pytest
import torch
import transformers as t
from models.tiny_models import tiny_tokenizer

from autoquant.errors import ModelError
from autoquant.models.reader import Reader, as_image, made_up_sound, picture

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def framed_tokenizer():
    from tokenizers import processors

    words = tiny_tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos> <eos>", special_tokens=[("<eos>", 61)]
    )
    return words


def bert(**changes):
    return t.BertModel(t.BertConfig(**SMALL, vocab_size=64, **changes)).eval()


def vit(**changes):
    return t.ViTModel(
        t.ViTConfig(**SMALL, **({"image_size": 32, "patch_size": 8} | changes))
    ).eval()


def test_a_text_keeps_what_the_tokenizer_puts_around_it_when_it_is_cut(tmp_path):
    reader = Reader(bert(), tmp_path, framed_tokenizer())
    assert reader.frame() == ([61], [61, 61])
    assert reader.ids("w1 w2 w3 w4 w5", 6) == [61, 1, 2, 3, 61, 61]
    assert len(reader.some_ids(40)) == 40


def test_a_text_is_no_longer_than_the_positions_that_the_model_has(tmp_path):
    assert Reader(bert(max_position_embeddings=70), tmp_path, tiny_tokenizer()).max_tokens == 70
    config = t.RobertaConfig(**SMALL, vocab_size=64, max_position_embeddings=34, pad_token_id=1)
    roberta = Reader(t.RobertaModel(config).eval(), tmp_path, tiny_tokenizer())
    assert roberta.max_tokens == 32  # its positions begin behind its padding's number


def test_a_picture_has_the_size_of_the_processor_or_else_of_the_configuration(tmp_path):
    bare = Reader(vit(), tmp_path, None)
    assert bare.made_up(0, 3, 1)["pixel_values"].shape == (3, 3, 32, 32)
    assert "preprocessor_config.json" in bare.words
    t.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    own = Reader(vit(image_size=16), tmp_path, None)
    assert own.made_up(0, 1, 1)["pixel_values"].shape == (1, 3, 16, 16)
    assert "its own processor" in own.words


def test_a_model_of_one_channel_gets_gray_pictures(tmp_path):
    reader = Reader(vit(num_channels=1), tmp_path, None)
    assert reader.batch(pictures=[picture(0)])["pixel_values"].shape == (1, 1, 32, 32)


def test_floating_inputs_have_the_dtype_of_the_model(tmp_path):
    reader = Reader(vit().to(torch.bfloat16), tmp_path, None)
    assert reader.made_up(0, 1, 1)["pixel_values"].dtype == torch.bfloat16


def test_made_up_inputs_are_the_same_for_a_number_and_differ_between_numbers():
    assert np.array_equal(np.asarray(picture(3)), np.asarray(picture(3)))
    assert not np.array_equal(np.asarray(picture(3)), np.asarray(picture(4)))
    assert np.array_equal(made_up_sound(1, 800), made_up_sound(1, 800))
    assert np.abs(made_up_sound(1, 800)).max() > 0.05


@pytest.mark.parametrize(
    ("value", "largest"),
    [
        (np.full((4, 5), 1.0), 255),
        (np.full((4, 5), 200.0), 200),
        (np.full((4, 5), 1), 1),
        (np.full((3, 4, 5), 7, dtype=np.uint8), 7),
        (np.full((4, 5, 1), 9), 9),
    ],
)
def test_numbers_become_a_picture(value, largest):
    image = as_image(value, "RGB")
    assert image.size == (5, 4) and np.asarray(image).max() == largest


def test_a_model_of_texts_without_a_tokenizer_is_refused(tmp_path, refusal):
    assert "--tokenizer" in refusal(ModelError, Reader, bert(), tmp_path, None)


def test_a_model_of_sounds_without_a_feature_extractor_is_refused(tmp_path, refusal):
    config = t.Wav2Vec2Config(
        **SMALL, conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    message = refusal(ModelError, Reader, t.Wav2Vec2Model(config).eval(), tmp_path, None)
    assert "preprocessor_config.json" in message
