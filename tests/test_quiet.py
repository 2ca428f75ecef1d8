"""What clients read says nothing of where things are on this machine."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.catalog.models import PACKAGE
from engine.quiet import without_paths
from tests.daemon import Daemon

TINY = {"resolution": "64x64", "video_length": 5, "num_inference_steps": 1}
FOLDERS = {"models_dir": Path("/srv/my models"), "state_path": Path("/srv/state"), "save_path": Path("/srv/state/out")}


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("no file in /srv/my models/a/vae.", "no file in models_dir/a/vae."),
        ("/srv/state/out/a.mp4: full", "save_path/a.mp4: full"),
        ("/srv/state/inputs/0a is gone", "state_path/inputs/0a is gone"),
        ("at '/home/some one/x/y.json' it is cut off", "at 'y.json' it is cut off"),
        ('"/etc/wangpd/token", (/opt/x/y.py:12) [/a/b]', '"token", (y.py:12) [b]'),
        ("see https://example.org/a/b and 3/4 or a/b", "see https://example.org/a/b and 3/4 or a/b"),
        ("somebody/model and models_dir/x.gguf", "somebody/model and models_dir/x.gguf"),
        ("cannot open /srv/elsewhere/", "cannot open elsewhere"),
        ("", ""),
    ],
)
def test_a_sentence_names_keys_and_last_parts(sentence: str, shown: str) -> None:
    assert without_paths(sentence, FOLDERS) == shown


def rewritten(path: Path, text: str) -> None:
    path.write_text(text)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def weights_of(model: Path) -> Path:
    return next(model.glob("transformer/*.safetensors"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "header": lambda model: weights_of(model).write_bytes(b"\xff" * 100),
    "cut": lambda model: cut(weights_of(model)),
    "config": lambda model: rewritten(model / "transformer" / "config.json", "{"),
    "tokenizer": lambda model: [rewritten(file, "{") for file in (model / "tokenizer").glob("*.json")],
    "vae": lambda model: rewritten(model / "vae" / "config.json", '{"_class_name": "AutoencoderKLWan", "z_dim": 7}'),
    "scheduler": lambda model: rewritten(model / "scheduler" / "scheduler_config.json", "{"),
    "no_encoder": lambda model: [file.unlink() for file in (model / "text_encoder").glob("config.json")],
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a copy of the embedded model for each kind of damage."""
    daemon = Daemon(tmp_path_factory.mktemp("quiet") / "a secret place", log_level="debug")
    entries = []
    for name, damage in DAMAGES.items():
        shutil.copytree(PACKAGE / "demo", daemon.models / name)
        damage(daemon.models / name)
        entries.append(
            f'[[models]]\nid = "{name}"\nbase = "wan_demo"\nname = "x"\ndescription = "x"\n'
            f'repo = "me/{name}"\nbuiltin = ""\nlicence = "x"\n'
        )
    (daemon.models / "broken.toml").write_text("\n".join(entries))
    with daemon:
        yield daemon


def assert_quiet(text: str) -> None:
    for secret in ("secret place", str(PACKAGE), "site-packages", str(Path.home() / "."), "/tmp/"):
        assert secret not in text, text
    assert not re.search(r"(?<![\w:/.~-])/(?:home|tmp|root|usr|var|opt|srv|work)\b", text), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_says_what_is_wrong_and_not_where(broken: Daemon, kind: str) -> None:
    answer = broken.post("/generate", {"prompt": "a", "model_type": kind, **TINY})
    if answer.status_code == 200:
        state = broken.finish(answer.json()["data"]["task_id"])
        assert state["status"] == "failed"
        assert state["error"]["message"]
    else:
        assert answer.status_code == 400  # what can be seen from its names is refused at once
    for path in ("/tasks", "/queue", "/config", f"/models/{kind}", "/health/ready", "/outputs"):
        assert_quiet(broken.get(path).text)
    assert_quiet(answer.text)


@pytest.mark.slow
def test_a_file_holds_no_path(broken: Daemon) -> None:
    (file,) = broken.run(**TINY)["files"]
    data = broken.get(f"/download/{file['filename']}").content
    assert b"secret place" not in data
    assert str(PACKAGE).encode() not in data


def test_errors_name_keys_and_not_paths(broken: Daemon) -> None:
    asked = [
        ("GET", "/models/none", None), ("GET", "/loras?model=none", None), ("GET", "/download/none.mp4", None),
        ("GET", "/preview/none.png", None), ("POST", "/models/wan_vace_14B/load", None),
        ("POST", "/models/wan_vace_14B/download", None),
        ("POST", "/generate", {"prompt": "a", "activated_loras": ["x"]}),
        ("POST", "/generate", {"prompt": "a", "model_type": "wan_vace_14B"}), ("POST", "/queue/99/retry", None),
    ]  # fmt: skip
    for method, path, body in asked:
        answer = broken.request(method, path, json=body)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert_quiet(answer.text)


@pytest.mark.parametrize("secret", ["state", "outputs"])
def test_what_the_daemon_makes_is_for_its_user_alone(broken: Daemon, secret: str) -> None:
    """With a usual umask, and not that of the unit."""
    broken.run(**TINY)
    made = [path for path in (broken.folder / secret).rglob("*") if path.name not in ("lock", ".wangpd.lock")]
    assert made
    assert {oct(path.stat().st_mode & 0o077) for path in made} == {"0o0"}


@pytest.mark.parametrize(
    ("umask", "mode"), [(0o022, 0o700), (0o002, 0o700), (0o000, 0o700), (0o027, 0o750), (0o007, 0o770), (0o077, 0o700)]
)
def test_a_umask_that_keeps_others_out_is_somebodys_decision(tmp_path: Path, umask: int, mode: int) -> None:
    daemon = Daemon(tmp_path / "own")
    daemon.launcher = ["sh", "-c", f'umask {umask:03o}; exec "$@"', "sh"]
    with daemon:
        assert daemon.outputs.stat().st_mode & 0o777 == mode
        assert daemon.state.stat().st_mode & 0o777 == mode
        assert (daemon.state / "journal.sqlite").stat().st_mode & 0o047 == mode & 0o047
