"""engine/settings.py: a row is enough for a setting, whether a pipeline's parameter carries it or code reads it."""

import dataclasses
import json
from typing import Any

import pytest

from engine.admission import Resolved, resolve
from engine.api.config import Config
from engine.api.requests import GenerateRequest, TaskSettings, setting_field
from engine.catalog.models import Catalog, Model, default_settings
from engine.job import EngineConfig, Job
from engine.queue.tasks import Task
from engine.settings import NO_VALUE, SETTINGS, Setting, echo, roles, value
from tests import contract, stand_ins

CATALOG = Catalog.load()
CARRIED = Setting("grain", float, 0, 10, default=1.0, role="grain", help="How much grain.")
READ = Setting("nickname", str, 0, 100, default="", help="What files are called.")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model with a pipeline that has a parameter for CARRIED."""
    for row in (CARRIED, READ):
        monkeypatch.setitem(SETTINGS, row.name, row)  # type: ignore[arg-type]  # read-only by its type alone
    demo = CATALOG.get("wan_demo")
    pipelines = {
        task: dataclasses.replace(pipeline, call={**pipeline.call, "grain": "grain_amount"})
        for task, pipeline in demo.pipelines.items()
    }
    return dataclasses.replace(demo, pipelines=pipelines)


def resolved(model: Model, **sent: Any) -> Resolved:
    return resolve(CATALOG, model, {"prompt": "a cat", **sent}, {})


def restored(job: Job, forget: str = "") -> Job:
    """The job as the journal gives it back; without a field that an earlier version did not write."""
    record = json.loads(Task(1, job).record())
    record["job"].pop(forget, None)
    return Task.restore(json.dumps(record)).job


# ---- a further setting is a row


def test_a_further_setting_that_was_sent_reaches_the_pipeline_by_its_role(model: Model) -> None:
    assert roles(resolved(model, grain=3.0).job)["grain"] == 3.0


def test_a_further_setting_that_was_not_sent_has_its_default(model: Model) -> None:
    job = resolved(model).job
    assert (roles(job)["grain"], value(job, "nickname")) == (1.0, "")


def test_a_further_setting_is_in_the_echo_and_among_the_defaults(model: Model) -> None:
    assert echo(resolved(model, grain=3.0, nickname="tom").job).items() >= {"grain": 3.0, "nickname": "tom"}.items()
    assert default_settings(model).items() >= {"grain": 1.0, "nickname": ""}.items()


def test_a_further_setting_of_a_model_is_its_default(model: Model) -> None:
    with_own = dataclasses.replace(model, defaults={**model.defaults, "grain": 7.0})
    assert value(resolved(with_own).job, "grain") == 7.0


@pytest.mark.usefixtures("model")
def test_a_model_without_the_role_ignores_the_setting_with_a_warning() -> None:
    result = resolved(CATALOG.get("wan_demo"), grain=3.0)
    assert result.warnings == ("grain: model 'wan_demo' has no such setting, the value was ignored",)
    assert (value(result.job, "grain"), "grain" in echo(result.job)) == (None, False)


def test_a_further_setting_survives_the_journal(model: Model) -> None:
    job = resolved(model, grain=3.0, nickname="tom").job
    assert restored(job) == job


def test_a_job_that_was_written_before_there_were_further_settings_is_restored(model: Model) -> None:
    job = restored(resolved(model, grain=3.0).job, forget="settings")
    assert (job.settings, value(job, "grain")) == ({}, None)


@pytest.mark.parametrize(("row", "wrong"), [(CARRIED, 11), (CARRIED, "3"), (READ, "x" * 101), (READ, 5)])
def test_the_schema_holds_a_setting_to_its_row(row: Setting, wrong: Any) -> None:
    schema = GenerateRequest.from_dict({row.name: setting_field(row)})()
    assert schema.validate({"prompt": "a", row.name: wrong}).keys() == {row.name}


# ---- the table


def test_the_table_has_the_contracts_defaults() -> None:
    assert {name: SETTINGS[name].default for name in contract.DEFAULTS} == contract.DEFAULTS


def test_the_echo_of_a_job_names_only_what_its_schema_does() -> None:
    job = stand_ins.job("a cat", lyrics="la", window_frames=9, skip_steps_cache_type="mag")
    assert echo(job).keys() <= TaskSettings().fields.keys()


def test_a_setting_that_depends_on_another_is_echoed_only_with_it() -> None:
    rows = [row.name for row in SETTINGS.values() if row.needs]
    assert echo(stand_ins.job("a cat", frames=0)).keys().isdisjoint(rows)


def test_every_setting_that_another_needs_exists() -> None:
    assert {row.needs for row in SETTINGS.values()} - {""} <= SETTINGS.keys()


def test_only_wangpds_own_settings_have_no_value_in_wangp() -> None:
    own = {"model_type", "use_model_defaults", "lyrics", "task"}
    assert {row.name for row in SETTINGS.values() if row.neutral is NO_VALUE} == own


# ---- the configuration's part


def test_the_worker_has_the_defaults_of_the_configuration() -> None:
    (config,) = Config().engines()
    assert config == EngineConfig(Config().save_path, Config().models_dir)
