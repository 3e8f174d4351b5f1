"""Programs that a command has compiled are there when it starts again."""

import collections

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from polarjax.cli import generate, main
from polarjax.cli.compile_cache import cache_folder, use_compile_cache

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
events: collections.Counter = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def _listen():
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home, and jax as it starts."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.delenv("POLARJAX_NO_COMPILE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_hits(home, monkeypatch, capsys):
    folder = home / ".cache" / "polarjax" / "xla"

    def compile_and_stop(*_, **__):
        jax.jit(lambda x: x + 1)(1.0)  # small, and quickly compiled
        raise ValueError("no model")

    monkeypatch.setattr(generate, "load", compile_and_stop)

    def start(*options):
        jax.clear_caches()
        events.clear()
        assert main.main([*options, "generate", "model", "prompt"]) == 1
        hits = events["/jax/compilation_cache/cache_hits"]
        return hits, events["/jax/compilation_cache/cache_misses"]

    assert start("--no-compile-cache") == (0, 0) and not folder.exists()
    compilation_cache.reset_cache()  # as in a new process
    hits, misses = start()
    assert not hits and misses
    kept = len(list(folder.iterdir()))
    assert kept >= misses
    compilation_cache.reset_cache()
    assert start() == (misses, 0)
    assert len(list(folder.iterdir())) == kept
    capsys.readouterr()


def test_what_is_set_wins(home, monkeypatch):
    monkeypatch.setenv("POLARJAX_NO_COMPILE_CACHE", "1")
    use_compile_cache()
    assert not jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("POLARJAX_NO_COMPILE_CACHE", "0")
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    use_compile_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == str(home / "mine")
    assert not (home / ".cache").exists()


def test_the_folder_is_the_users(home, monkeypatch, capsys):
    assert cache_folder() == home / ".cache" / "polarjax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_folder() == home / "xdg" / "polarjax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == home / ".cache" / "polarjax" / "xla"
    (home / ".cache").write_text("a file")
    use_compile_cache()
    assert not jax.config.values["jax_compilation_cache_dir"]
    assert "note: compiled programs are not kept" in capsys.readouterr().err
