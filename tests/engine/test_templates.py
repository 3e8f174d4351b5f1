"""Chat templates render, byte for byte, what `apply_chat_template` does."""

import dataclasses
import datetime
import json
import types

import jinja2
import pytest

import polarjax
from convert import convert
from convert.export import export
from convert.tokenizer import from_folder, from_gguf
from polarjax.engine import Tokenizer
from polarjax.params import CHAT_TEMPLATE_FILE, save
from tests.engine.chat_templates import (
    BY_NAME,
    CHATML,
    NAMED,
    SMOLLM_2,
    TEMPLATES,
)
from tests.engine.conversations import ASKED, CONVERSATIONS, DOCUMENTS, TOOLS
from tests.engine.tool_templates import QWEN_2_5, SMOLLM_3
from tests.models import LLAMA, byte_tokenizer

transformers = pytest.importorskip(
    "transformers",
    minversion="5.24",  # 5.17 renders some otherwise
    reason="needs 5.24: pip install 'transformers>=5.24'",
)


@pytest.fixture(autouse=True)
def a_day(monkeypatch):
    """Midnight must not fall between two renderings."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 9, 8, 7)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Day)
    # Not the class of all modules: what is imported meanwhile in C would crash.
    ours = types.SimpleNamespace(datetime=Day)
    monkeypatch.setattr("polarjax.engine.templates.datetime", ours)


def hugging_face_folder(folder, tokenizer_config, model=None, **files):
    """A folder as transformers has it, its weights left out."""
    folder.mkdir(exist_ok=True)
    contents = {
        "config.json": model or {"model_type": "llama"},
        "tokenizer.json": json.loads(byte_tokenizer().to_str()),
        "tokenizer_config.json": tokenizer_config,
        **files,
    }
    for name, content in contents.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def as_converted(source, folder):
    """The tokenizer of a checkpoint of that folder; the weights are left out."""
    folder.mkdir()
    for name, text in from_folder(source)[0].items():
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer.load(dataclasses.replace(LLAMA, folder=str(folder)))


def rendered(function, *arguments, **options):
    """What it returns, or that it fails."""
    try:
        return function(*arguments, **options)
    except (ValueError, TypeError, jinja2.TemplateError):
        return "fails"


def compare(ours, theirs, conversations=None, **more):
    """Every conversation, in every way; returns how many were rendered."""
    count = 0
    for name, messages in (conversations or CONVERSATIONS).items():
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": True, "tools": TOOLS},
            {"add_generation_prompt": False, "documents": DOCUMENTS},
            {"add_generation_prompt": True, "enable_thinking": False},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            options = {**options, **more}
            expected = rendered(
                theirs.apply_chat_template, messages, tokenize=False, **options
            )
            assert rendered(ours.chat, messages, **options) == expected, (name, options)
            count += expected != "fails"
    return count


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_those_of_transformers(name, tmp_path):
    template, special = TEMPLATES[name]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
        **special,
    }
    source = hugging_face_folder(tmp_path / "source", config)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = as_converted(source, tmp_path / "ours")
    assert ours.special == theirs.special_tokens_map
    assert compare(ours, theirs) >= 20


def test_a_model_without_a_template(tmp_path):
    source = hugging_face_folder(tmp_path / "source", NAMED)
    ours = as_converted(source, tmp_path / "ours")
    assert ours.chat_template is None
    assert ours.special == NAMED
    with pytest.raises(ValueError, match="no chat template"):
        ours.chat([ASKED])


GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
ADDED = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": True}


@pytest.mark.parametrize(
    "config, model, files",
    [
        ({}, "llama", {}),
        (None, "llama", {}),
        ({**GPT2, "eos_token": "<end>"}, "gpt2", {}),
        (GPT2, "opt", {}),
        (None, "opt", {}),
        ({"tokenizer_class": "Qwen2TokenizerFast", "bos_token": None}, "qwen2", {}),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "a"}, "qwen2", {}),
        (None, "qwen3", {}),
        ({"tokenizer_class": "LlamaTokenizer", "pad_token": "b"}, "llama", {}),
        ({"tokenizer_class": "LlamaTokenizer", "pad_token": "b"}, "mistral", {}),
        (
            {
                "bos_token": {"__type": "AddedToken", **ADDED},
                "eos_token": "b",
                "add_bos_token": True,
                "image_token": "<image>",
                "additional_special_tokens": ["c", "d"],
            },
            "llama",
            {},
        ),
        (
            {"eos_token": "b", "bos_token": "q"},
            "llama",
            {"special_tokens_map.json": {"bos_token": ADDED, "unk_token": "c"}},
        ),
        (
            {"eos_token": "b", "added_tokens_decoder": {}},
            "llama",
            {"special_tokens_map.json": {"bos_token": "a"}},
        ),
        ({"extra_special_tokens": {"image_token": "<i>"}}, "llama", {}),
    ],
)
def test_special_tokens_are_those_of_transformers(config, model, files, tmp_path):
    source = hugging_face_folder(
        tmp_path / "source", config, {"model_type": model}, **files
    )
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = as_converted(source, tmp_path / "ours")
    assert ours.special == theirs.special_tokens_map


@pytest.mark.parametrize(
    "config, files",
    [
        ({"chat_template": CHATML}, {"chat_template.jinja": SMOLLM_2}),
        (
            {"chat_template": CHATML},
            {
                "chat_template.jinja": SMOLLM_2,
                "additional_chat_templates/tool_use.jinja": QWEN_2_5,
            },
        ),
        (
            {"chat_template": BY_NAME},
            {"additional_chat_templates/tool_use.jinja": QWEN_2_5},
        ),
        ({"chat_template": BY_NAME[1:]}, {}),
        (
            {"chat_template": BY_NAME[:1]},
            {"chat_template.json": {"chat_template": "x"}},
        ),
    ],
)
def test_files_of_templates_in_their_order(config, files, tmp_path):
    source = hugging_face_folder(tmp_path / "source", {**NAMED, **config}, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = as_converted(source, tmp_path / "ours")
    assert ours.chat_template == theirs.chat_template or (
        {"default": ours.chat_template} == theirs.chat_template
    )
    compare(ours, theirs)


def test_what_templates_need_goes_with_the_checkpoint(tmp_path):
    pytest.importorskip("torch", reason="needs it: pip install torch")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=3,
            eos_token_id=[4, 5],
        )
    )
    model.save_pretrained(tmp_path / "source")
    # Not the tokens that the configuration has.
    config = {"eos_token": "<end>", "pad_token": "a", "chat_template": BY_NAME}
    written = json.loads((tmp_path / "source" / "config.json").read_text())
    source = hugging_face_folder(tmp_path / "source", config, written)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    assert theirs.bos_token is None
    convert(source, tmp_path / "ours", dtype="float32", progress=False)
    params = polarjax.load(tmp_path / "ours")
    save(params, tmp_path / "saved")
    export(polarjax.load(tmp_path / "saved"), tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again", dtype="float32", progress=False)
    for name in ("ours", "saved", "again"):
        ours = Tokenizer.load(polarjax.load(tmp_path / name).config)
        assert ours.special == theirs.special_tokens_map
        assert (ours.bos_id, ours.eos_id) == (None, 256)
        compare(ours, theirs)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.special_tokens_map == theirs.special_tokens_map
    assert back.chat_template == theirs.chat_template


def test_checkpoints_of_before_have_the_tokens_of_their_configuration(tmp_path):
    folder = hugging_face_folder(tmp_path / "old", None)
    config = dataclasses.replace(
        LLAMA, folder=str(folder), bos_ids=(256,), eos_ids=(256, 1)
    )
    special = {"bos_token": "<end>", "eos_token": "<end>"}
    assert Tokenizer.load(config).special == special


def test_gguf_says_which_tokens_have_a_role():
    tokens = [byte_tokenizer().id_to_token(i) for i in range(257)]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3],  # the last one is control
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.padding_token_id": 8,
        "tokenizer.ggml.unknown_token_id": 10**6,
        "tokenizer.chat_template": SMOLLM_2,
        "tokenizer.chat_template.tool_use": QWEN_2_5,
        "tokenizer.chat_templates": ["tool_use"],
    }
    files, notes = from_gguf(fields)
    assert not notes and files[CHAT_TEMPLATE_FILE] == SMOLLM_2
    assert json.loads(files["tokenizer_config.json"]) == {
        "eos_token": tokens[7],
        "pad_token": tokens[8],
        "chat_template": [{"name": "tool_use", "template": QWEN_2_5}],
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must hold a JSON object"),
        ('{"bos_token": 3}', "bos_token must be text, not 3"),
        ('{"chat_template": "x"}', "chat_template must be a list of named texts"),
        ('{"chat_template": [{"name": "x"}]}', "must be a list of named texts"),
        ('{"chat_template": [{"name": "x", "template": 1}]}', "x must be text, not 1"),
    ],
)
def test_a_damaged_file_of_roles_is_one_error(text, message, tmp_path):
    folder = hugging_face_folder(tmp_path / "old", None)
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(dataclasses.replace(LLAMA, folder=str(folder)))


def test_errors():
    def chat(messages, template=SMOLLM_3, **options):
        return Tokenizer(byte_tokenizer(), template).chat(messages, **options)

    with pytest.raises(ValueError, match="pass at least one message"):
        chat([])
    with pytest.raises(ValueError, match=r"messages\[1\] must be a dict, got 'x'"):
        chat([ASKED, "x"])
    with pytest.raises(ValueError, match=r"\[0\]\['content'\] must be text.* object"):
        chat([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="choose one of them"):
        chat([ASKED], continue_final_message=True)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValueError, match="does not show the last message"):
        chat([ASKED], "{{ bos_token }}", **options)
    with pytest.raises(ValueError, match="no text to be continued"):
        chat([{"role": "user"}], **options)
    with pytest.raises(
        ValueError,
        match=r"content'\] is no Unicode text: its character 2 is the lone surrogate "
        r"'\\udcff'",
    ):
        chat([{"role": "user", "content": "hi\udcff"}])
    with pytest.raises(ValueError, match=r"rag, tool_use: none of them .* 'default'"):
        Tokenizer(byte_tokenizer(), {"rag": "", "tool_use": ""}).chat([ASKED])
