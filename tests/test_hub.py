"""Adapters that leave for the hub."""

import dataclasses
import json

import pytest

from polarjax import hub
from polarjax.sparsity import save_adapter
from tests.models import LLAMA, random_params


def test_push_uploads_the_adapter_and_nothing_else(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    config = dataclasses.replace(LLAMA, budgets=(4, 2, 2, 2), model_hash="abc")
    params = random_params(LLAMA, routers=True)
    save_adapter(tmp_path / "a", dataclasses.replace(params, config=config))
    (tmp_path / "a" / "notes.txt").write_text("mine")
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, **options):
            calls.append(options)
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push_adapter(tmp_path / "a", "me/mine") == "https://hub/commit"
    assert calls[0] == ("me/mine", {"exist_ok": True})
    assert calls[1]["repo_id"] == "me/mine"
    assert calls[1]["folder_path"] == str(tmp_path / "a")
    assert calls[1]["allow_patterns"] == ["card.json", "routers.safetensors"]


def test_what_is_no_adapter_is_not_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        hub.push_adapter(tmp_path, "me/mine")
    (tmp_path / "card.json").write_text(json.dumps({"format_version": 1}))
    (tmp_path / "routers.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no adapter card"):
        hub.push_adapter(tmp_path, "me/mine")
