"""wangpd.toml and the command line: what they decide, and the sentence for each that is wrong."""

import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.api import config as configuration
from engine.api.config import KEYS, ConfigError, load_config
from tests.daemon import ROOT, Daemon

SHIPPED = ROOT / "wangpd.toml"
FOLDERS = ("save_path", "state_path", "models_dir", "loras_dir")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`wangpd.py` with these arguments, in `folder`, until it ends."""
    command = [sys.executable, str(ROOT / "wangpd.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def written(folder: Path, text: str) -> Path:
    """A wangpd.toml in `folder` with this text."""
    path = folder / "wangpd.toml"
    path.write_text(text)
    return path


def plain(value: Any) -> Any:
    """A default as TOML has it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


# ---- the shipped file


def test_the_shipped_file_holds_every_key_with_its_default() -> None:
    shipped = tomllib.loads(SHIPPED.read_text())
    assert shipped == {name: plain(field.default) for name, field in KEYS.items()}


@pytest.mark.parametrize("name", KEYS)
def test_the_shipped_file_explains_the_key_in_configs_own_words(name: str) -> None:
    lines = SHIPPED.read_text().splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(f"{name} =")]
    assert lines[place - 1] == f"# {KEYS[name].metadata['why']}"


def test_the_shipped_file_can_be_rewritten_by_make_install() -> None:
    assert re.search(r'^models_dir = "models"$', SHIPPED.read_text(), re.MULTILINE)


def test_the_shipped_file_means_the_same_as_no_file(tmp_path: Path) -> None:
    path = written(tmp_path, SHIPPED.read_text())
    assert load_config(path, {}) == load_config(written(tmp_path, ""), {})


# ---- what wins


@pytest.mark.parametrize("name", [name for name in KEYS if name not in FOLDERS])
def test_a_key_that_nobody_sets_has_its_default(name: str, tmp_path: Path) -> None:
    assert getattr(load_config(written(tmp_path, ""), {}), name) == KEYS[name].default


def test_the_file_wins_over_the_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, 'port = 7861\nimage_format = "webp"\n'), {})
    assert (config.port, config.image_format) == (7861, "webp")


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'port = 7861\nhost = "0.0.0.0"\n')
    config = load_config(path, {"port": 7862})
    assert (config.port, config.host) == (7862, "0.0.0.0")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_relative_path_is_relative_to_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(written(tmp_path, f'{name} = "here"\n'), {})
    assert getattr(config, name) == tmp_path / "here"


@pytest.mark.parametrize("name", FOLDERS)
def test_an_absolute_path_stays_as_it_is(name: str, tmp_path: Path) -> None:
    assert getattr(load_config(written(tmp_path, f'{name} = "/srv/x"\n'), {}), name) == Path("/srv/x")


def test_a_relative_path_in_a_flag_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = written(tmp_path, 'save_path = "here"\n')
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(path, {"save_path": "there"})
    assert config.save_path == tmp_path / "elsewhere" / "there"


@pytest.mark.parametrize(
    ("written_path", "meant"),
    [("token", "{folder}/token"), ("/run/token", "/run/token"), ("${CREDENTIALS_DIRECTORY}/token", "/run/cred/token")],
)
def test_the_token_file_is_found_likewise(
    written_path: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/cred")  # what LoadCredential= gives to a unit
    config = load_config(written(tmp_path, f'token_file = "{written_path}"\n'), {})
    assert config.token_file == meant.format(folder=tmp_path)


@pytest.mark.parametrize(("flags", "shown"), [({}, "clips"), ({"save_path": "out/there"}, "out/there")])
def test_config_shows_save_path_as_it_was_written(flags: dict[str, str], shown: str, tmp_path: Path) -> None:
    assert load_config(written(tmp_path, 'save_path = "clips"\n'), flags).shown_save_path == shown


@pytest.mark.parametrize("path", ["/srv/clips", "/home/somebody/my films/", "/clips"])
def test_of_an_absolute_save_path_the_last_part_is_shown(path: str, tmp_path: Path) -> None:
    for config in (
        load_config(written(tmp_path, f'save_path = "{path}"\n'), {}),
        load_config(written(tmp_path, ""), {"save_path": path}),
    ):
        assert (config.shown_save_path, config.save_path) == (Path(path).name, Path(path))


# ---- where the file is looked for


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The working directory and a stand-in for /etc/wangpd, both empty."""
    here, system = tmp_path / "here", tmp_path / "etc"
    here.mkdir()
    system.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(configuration, "SYSTEM_CONFIG", system / "wangpd.toml")
    return here, system


def test_the_working_directory_comes_before_etc(places: tuple[Path, Path]) -> None:
    for folder, port in zip(places, (1, 2), strict=True):
        written(folder, f"port = {port}\n")
    assert load_config(None, {}).port == 1


def test_etc_is_read_where_the_working_directory_has_no_file(places: tuple[Path, Path]) -> None:
    _, system = places
    written(system, "port = 2\n")
    config = load_config(None, {})
    assert (config.port, config.save_path) == (2, system / "outputs")


def test_a_file_that_is_named_is_the_only_one_read(places: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in places:
        written(folder, "port = 1\n")
    assert load_config(written(tmp_path, "port = 3\n"), {}).port == 3


def test_without_any_file_the_folders_lie_in_the_working_directory(places: tuple[Path, Path]) -> None:
    here, _ = places
    config = load_config(None, {})
    assert [getattr(config, name) for name in FOLDERS] == [
        here / "outputs",
        here / "state",
        here / "models",
        here / "loras",
    ]


# ---- what is wrong: exit code 2 and one sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('prt = 7860', "prt: there is no such key; did you mean port?"),
        ("colour = 1", "colour: there is no such key; the keys are host, port, "),
        ('port = "7860"', "port: '7860' must be a whole number"),
        ("port = 7860.5", "port: 7860.5 must be a whole number"),
        ("port = true", "port: True must be a whole number"),
        ("port = 65536", "port: 65536 must be between 0 and 65535"),
        ("host = 1", "host: 1 must be text in quotes"),
        ('host = ""', "host: must not be empty"),
        ("host = []", "host: must not be empty"),
        ('host = ["127.0.0.1", ""]', "host: must not be empty"),
        ('host = ["127.0.0.1", 1]', "host[1]: 1 must be text in quotes"),
        ('host = "unix:wangpd.sock"', "host: 'unix:wangpd.sock' must have an absolute path, such as unix:/run/"),
        ('save_path = ""', "save_path: must not be empty"),
        ('allow_download = "yes"', "allow_download: 'yes' must be true or false"),
        ('device = "gpu"', "device: 'gpu' must be auto, cuda, cuda:N, mps or cpu"),
        ('devices = ["cuda:0", "cuda"]', "devices: 'cuda' must be cuda:N or cpu"),
        ('warm_start = "wan_demo"', "warm_start: 'wan_demo' must be true or false"),
        ("profile = 6", "profile: must be one of 0, 1, 2, 3, 3.5, 4, 4.5, 5, not 6"),
        ('image_format = "gif"', "image_format: must be one of 'png', 'jpeg', 'webp', not 'gif'"),
        ('allowed_hosts = "a"', "allowed_hosts: must be a list such as"),
        ("allowed_hosts = [1]", "allowed_hosts[0]: 1 must be text in quotes"),
        ('base_path = "video/"', "base_path: 'video/' must be empty or begin with /, and not end with it"),
        ("cancel_grace_s = -1", "cancel_grace_s: -1.0 must be between 0 and 3600"),
        ('[server]\nport = 1', "server: there is no such key"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_file_key_value_and_rule(line: str, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, line)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(f"{path}: {sentence}")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cancel_grace_s"):
        load_config(written(tmp_path, f"cancel_grace_s = {value}"), {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prt = 7860\n", "wangpd.toml: prt: there is no such key; did you mean port?"),
        ("port = 70000\n", "wangpd.toml: port: 70000 must be between 0 and 65535"),
        ("port 7860\n", "wangpd.toml: not valid TOML: Expected '=' after a key"),
        ('default_model = "wan_9"\n', "default_model: 'wan_9' is not in the catalogue; see: wangpd models"),
    ],
)  # fmt: skip
def test_a_wrong_file_ends_the_start_with_code_2_and_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    written(tmp_path, text)
    result = run(folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"wangpd: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--port", "99999"), "command line: port: 99999 must be between 0 and 65535"),
        (("--port", "many"), "command line: argument --port: invalid int value: 'many'"),
        (("--prot", "1"), "command line: unrecognized arguments: --prot 1"),
        (("--config", "none.toml"), "none.toml: No such file or directory; name another file with --config"),
        (("--config", "."), ".: Is a directory; name another file with --config"),
    ],
)
def test_a_wrong_command_line_ends_the_start_likewise(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"wangpd: {sentence}")
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "wangpd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "wangpd.toml", {})


# ---- the command line


def test_check_config_says_that_all_is_right_and_makes_nothing(tmp_path: Path) -> None:
    written(tmp_path, SHIPPED.read_text())
    result = run("--check-config", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "wangpd: the configuration is right\n")
    assert [path.name for path in tmp_path.iterdir()] == ["wangpd.toml"]


@pytest.mark.parametrize("flag", ["--api", "--api-only"])
def test_wangps_own_flags_are_accepted(flag: str, tmp_path: Path) -> None:
    assert run(flag, "--check-config", folder=tmp_path).returncode == 0


def test_version_is_the_one_of_the_package(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version", folder=tmp_path).stdout == f"wangpd {project['version']}\n"


def test_help_names_every_flag(tmp_path: Path) -> None:
    text = run("--help", folder=tmp_path).stdout
    flags = ["config", "host", "port", "save-path", "state-path", "api", "api-only", "check-config", "version"]
    assert all(re.search(rf"^ +--{flag}\b", text, re.MULTILINE) for flag in flags)


# ---- what only the machine can tell: exit code 1 and one sentence


def refused(folder: Path, *arguments: str) -> str:
    """What the daemon says as it does not start."""
    result = run("--port", "0", *arguments, folder=folder)
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, "--port", str(port))
    assert said.startswith(f"wangpd: port: {port} on 127.0.0.1 is taken; ")


def test_a_host_that_is_not_this_machine_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path, "--host", "192.0.2.1").startswith(
        "wangpd: host: '192.0.2.1' is no address of this machine"
    )


@pytest.mark.parametrize("name", ["save_path", "state_path"])
def test_a_folder_that_cant_be_made_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(tmp_path, f"--{name.replace('_', '-')}", "file/below")
    assert said.startswith(f"wangpd: {name}: {tmp_path / 'file' / 'below'} can't be made: Not a directory; ")


def test_a_folder_that_cant_be_written_is_told(tmp_path: Path) -> None:
    # The kernel's own, so that it holds for root too, whom no permission stops.
    said = refused(tmp_path, "--save-path", "/proc/self")
    assert said.startswith("wangpd: save_path: /proc/self can't be written to; ")


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "can't be read: No such file"), ("\n", "is empty; write a token")]
)
def test_a_token_file_without_a_token_is_told(content: str | None, sentence: str, tmp_path: Path) -> None:
    written(tmp_path, 'token_file = "token"\n')
    if content is not None:
        (tmp_path / "token").write_text(content)
    assert refused(tmp_path).startswith(f"wangpd: token_file: {tmp_path / 'token'} {sentence}")


def test_a_second_daemon_on_the_same_queue_is_told(own_daemon: Daemon) -> None:
    own_daemon.start()
    said = refused(own_daemon.folder, "--config", "wangpd.toml")
    assert said.startswith(f"wangpd: state_path: {own_daemon.state} is in use by another wangpd")
