"""`autoquant generate`, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from end_to_end.applied import save_both
from typer.testing import CliRunner

from autoquant import prompting
from autoquant.cli import generate as command
from autoquant.cli.main import app
from autoquant.delivery.manifest import MANIFEST

PROMPT = "w1 w2 w3"
pytestmark = pytest.mark.models


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Nothing is compiled: tests/runtime/generate compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQUANT_EAGER", "1")
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of the unquantized model, folder of the quantized one)."""
    return save_both(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def quantized(both):
    return both[1]


def run(*arguments, stdin=""):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def succeed(*arguments, stdin=""):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def greedy(folder, text, tokens):
    tokenizer = prompting.tokenizer_of(folder)
    prompt = prompting.encode(tokenizer, text)
    model = prompting.load_generator(folder, tokenizer, "cpu").model
    ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_it_prints_the_prompt_and_the_greedy_text_then_how_fast_it_came(quantized):
    result = succeed(quantized, "--prompt", PROMPT, "--max-new-tokens", 6)
    written, _, speed = result.stdout.partition("\n\n")
    assert written == PROMPT + greedy(quantized, PROMPT, 6)
    assert re.fullmatch(
        r"ready after [\d.]+ s; then 3 tokens of prompt, 6 new ones: first token after [\d.]+ s, [\d.]+ tokens/s after it,"
        r" [\d.]+ s in all\n",
        speed,
    )
    assert (
        "load: quantized model on cpu" in result.stderr
        and "prepare: a first short request took" in result.stderr
    )


def test_the_prompt_comes_from_a_file_or_from_stdin(quantized, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = (quantized, "--max-new-tokens", 4, "--json")
    given = json.loads(succeed(*options, "--prompt", PROMPT).stdout)["text"]
    assert (
        json.loads(succeed(*options, "--prompt-file", tmp_path / "prompt.txt").stdout)["text"]
        == given
    )
    assert json.loads(succeed(*options, stdin=PROMPT).stdout)["text"] == given


def test_without_any_prompt_it_takes_one_of_its_own_and_says_so(quantized):
    result = succeed(quantized, "--max-new-tokens", 2)
    assert f"prompt: {command._DEFAULT_PROMPT!r}" in result.stderr
    assert result.stdout.startswith(command._DEFAULT_PROMPT)


def test_json_has_the_text_and_the_numbers_and_nothing_else_is_on_stdout(quantized):
    shown = json.loads(
        succeed(quantized, "--prompt", PROMPT, "--max-new-tokens", 5, "--json").stdout
    )
    assert shown["text"] == greedy(quantized, PROMPT, 5)
    assert (shown["prompt_tokens"], shown["new_tokens"]) == (3, 5)
    assert 0 < shown["first_token_s"] < shown["total_s"] and shown["ready_s"] > 0
    assert shown["tokens_per_s"] == pytest.approx(4 / (shown["total_s"] - shown["first_token_s"]))


def test_one_token_has_no_pace(quantized):
    shown = json.loads(
        succeed(quantized, "--prompt", PROMPT, "--max-new-tokens", 1, "--json").stdout
    )
    assert shown["tokens_per_s"] is None and shown["first_token_s"] == shown["total_s"]


def test_the_first_request_is_not_the_one_that_is_timed(quantized, monkeypatch):
    made = []
    reply = prompting.Generator.reply

    def noted(self, prompt, max_new_tokens, **options):
        made.append((max_new_tokens, options.get("stop_after")))
        return reply(self, prompt, max_new_tokens, **options)

    monkeypatch.setattr(prompting.Generator, "reply", noted)
    succeed(quantized, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert made == [(12, 8), (12, None)], "like the timed one, but stopped early"


def test_a_request_can_be_stopped_early(quantized):
    generator = prompting.load_generator(quantized, prompting.tokenizer_of(quantized), "cpu")
    prompt = prompting.encode(generator.tokenizer, PROMPT)
    assert len(generator.reply(prompt, 20, stop_after=3).ids) == 3


def test_the_original_is_timed_in_turn_and_the_texts_are_compared(both):
    original, quantized = both
    result = succeed(quantized, "--prompt", PROMPT, "--max-new-tokens", 20, "--compare", original)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["this", "model"] in [row[:2] for row in rows] and ["unquantized"] in [
        row[:1] for row in rows
    ]
    assert re.search(r"times faster +[\d.]+x +[\d.]+x +[\d.]+x", result.stdout)
    ours, theirs = (greedy(folder, PROMPT, 20).split() for folder in (quantized, original))
    first = next(
        place
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True), 1)
        if one != other
    )
    assert (
        f"greedy text: differs from token {first} on ({ours[first - 1]!r}, unquantized {theirs[first - 1]!r})"
        in (result.stdout)
    )


def test_a_model_compared_with_itself_writes_the_same(both):
    original, _ = both
    shown = json.loads(
        succeed(
            original, "--prompt", PROMPT, "--max-new-tokens", 4, "--compare", original, "--json"
        ).stdout
    )
    assert shown["first_difference"] is None
    assert shown["times_faster"]["total"] == pytest.approx(
        shown["original"]["total_s"] / shown["total_s"]
    )


def test_the_original_is_compared_in_the_plans_dtype(both, monkeypatch):
    original, quantized = both
    dtypes = []
    load = prompting.load_generator
    monkeypatch.setattr(
        prompting,
        "load_generator",
        lambda *given, **code: (dtypes.append(given[3]), load(*given, **code))[1],
    )
    succeed(quantized, "--prompt", PROMPT, "--max-new-tokens", 2, "--compare", original)
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_sampled_texts_are_not_compared(both):
    result = succeed(
        both[1],
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        3,
        "--compare",
        both[0],
        "--temperature",
        0.8,
    )
    assert (
        "texts are sampled, so they are not compared" in result.stdout
        and "greedy" not in result.stdout
    )


def test_no_more_is_written_than_the_model_has_room_for(quantized):
    result = succeed(quantized, "--prompt", " ".join(["w1"] * 60), "--max-new-tokens", 20)
    assert f"4 new tokens instead of 20: {quantized} takes 64 in all" in result.stderr
    result = run(quantized, "--prompt", " ".join(["w1"] * 64))
    assert result.exit_code == 2
    assert (
        "error: the prompt has 64 tokens" in result.stderr
        and "takes 64 in all: shorten it" in result.stderr
    )


def test_a_conversation_is_kept_and_ends_with_the_input(quantized, monkeypatch):
    conversations = []
    encode = prompting.encode_chat

    def noted(tokenizer, messages):
        conversations.append([message["role"] for message in messages])
        return encode(tokenizer, messages)

    monkeypatch.setattr(prompting, "encode_chat", noted)
    result = succeed(quantized, "--chat", "--max-new-tokens", 3, stdin="w1 w2\n\nw5\n")
    assert conversations == [["user"], ["user"], ["user", "assistant", "user"]], (
        "the first to prepare"
    )
    assert len(result.stdout.split()) == 6
    assert result.stderr.count("to the first token") == 2


def test_a_model_without_a_chat_template_is_not_talked_with(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "folder")
    (folder / "chat_template.jinja").unlink()
    result = run(folder, "--chat")
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"error: {folder} has no chat template, so it is no model to talk with: use --prompt\n"
    )


def test_an_adapter_beside_weights_is_not_left_out_silently(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "adapted")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    result = run(folder)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {folder} holds an adapter (adapter_config.json)")
    assert "merge_and_unload" in result.stderr


def test_everything_that_is_missing_is_said_at_once(quantized, tmp_path):
    (tmp_path / "empty").mkdir()
    bare = shutil.copytree(
        quantized, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")
    )
    result = run(bare, "--compare", tmp_path / "empty")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {bare} has no tokenizer: put its tokenizer.json there; {tmp_path / 'empty'} holds no model (no config.json)\n"
    )


def test_a_module_that_is_no_language_model_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    result = run(tmp_path, "--prompt", PROMPT)
    assert result.exit_code == 2
    assert "holds a module that is no language model: run it with autoquant.load" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--chat", "--prompt", "x"), "cannot be combined with --prompt"),
        (("--chat", "--compare", "x", "--json"), "cannot be combined with --compare, --json"),
        (("--prompt", "x", "--prompt-file", "y"), "cannot be combined with --prompt-file"),
        (("--prompt-file", "absent.txt"), "cannot read absent.txt: No such file or directory"),
        (("--prompt", ""), "the prompt is empty"),
        (("--device", "tpu", "--prompt", "x"), "unknown device"),
        (("--max-new-tokens", "0"), "max-new-tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "1e-45"), "--temperature: scores cannot be divided by 1e-45: give 0"),
        (("--temperature", "inf"), "--temperature: scores cannot be divided by inf: give 0"),
    ],
)
def test_bad_options_are_one_line(quantized, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    result = run(quantized, *options)
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_auto_is_the_device_that_the_plan_was_made_for(quantized, both, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert prompting.device_of(quantized, "auto") == "cpu"
    assert prompting.device_of(both[0], "auto") == "cuda"
