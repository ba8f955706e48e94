"""A command line becomes checked stages: merging, profiles, chains, starting points."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from threestudio import registry
from threestudio.launcher import stages
from threestudio.launcher.arguments import parse_arguments
from threestudio.launcher.profiles import Machine
from threestudio.utils.checkpoint import save_checkpoint
from threestudio.utils.config_errors import ConfigError
from threestudio.utils.config_sources import parse_override


@dataclass
class SystemConfig:
    prompt_processor: dict = field(default_factory=dict)
    guidance_type: str = ""
    guidance: dict = field(default_factory=dict)
    weights: str | None = None
    scale: float = 1.0


@dataclass
class GuidanceConfig:
    model: str = "owner/real"


class System:
    Config = SystemConfig


class Guidance:
    Config = GuidanceConfig

    @classmethod
    def required_models(cls, cfg):
        return [cfg.get("model", "owner/real")]


class DataModule:
    @dataclass
    class Config:
        size: int = 64


STAGE = """
name: {name}
tag: "${{rmspace:${{system.prompt_processor.prompt}},_}}"
exp_root_dir: {root}
data_type: r1-datamodule
system_type: r1-system
system:
  prompt_processor:
    prompt: a red cube
trainer:
  max_steps: 10
profiles:
  embedded:
    trainer: {{max_steps: 5}}
  paper: {{}}
"""
PROMPT = "system.prompt_processor.prompt"


def test_a_profile_s_values_go_with_the_module_that_the_command_line_replaces(monkeypatch):
    """What is written for the new module stays: in the profile's case, the command line's."""

    class Clay:
        @dataclass
        class Config:
            grain: int = 1

    class Stone(Clay):
        @dataclass
        class Config:
            size: int = 2

    monkeypatch.setattr(registry, "__modules__", {"r1-clay": Clay, "r1-stone": Stone})
    file_cfg = OmegaConf.create({"system": {"geometry_type": "r1-stone", "geometry": {"size": 3}}})
    clay = OmegaConf.create({"system": {"geometry_type": "r1-clay", "geometry": {"grain": 4}}})
    profiled = stages.Source(Path("a.yaml"), file_cfg)
    assert profiled.merged(clay).system.geometry == {"grain": 4}
    back = [parse_override(text) for text in ("system.geometry_type=r1-stone",)]
    assert stages.Source(Path("a.yaml"), file_cfg, tuple(back)).merged(clay).system.geometry == {}
    back.append(parse_override("system.geometry.size=5"))
    again = stages.Source(Path("a.yaml"), file_cfg, tuple(back)).merged(clay)
    assert again.system.geometry == {"size": 5}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "__modules__", {})
    classes = {"r1-system": System, "r1-datamodule": DataModule, "r1-guidance": Guidance}
    for name, cls in classes.items():
        registry.register(name)(cls)
    no_gpu = Machine(None, lambda name: False, lambda name: False)
    monkeypatch.setattr(stages, "probe_machine", lambda candidate: no_gpu)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(STAGE.format(name=name, root=tmp_path / "out"))
    return tmp_path


def plan(project, *argv, mode="--train", files=("one",)):
    configs = [str(project / f"{name}.yaml") for name in files]
    return stages.plan_stages(parse_arguments(["--config", *configs, mode, *argv]), project)


def edit(project, name, text):
    path = project / f"{name}.yaml"
    path.write_text(path.read_text() + text)


def checkpoint(project, trial, name="one", **entries):
    path = project / "out" / name / trial / "ckpts" / "last.ckpt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, {"state_dict": {}, "epoch": 0, "global_step": 3, **entries})
    return path


class TestMerging:
    def test_profile_wins_over_the_file_and_the_command_line_over_both(self, project):
        assert plan(project, "profile=paper")[0].cfg.trainer.max_steps == 10
        stage = plan(project)[0]
        assert stage.cfg.trainer.max_steps == 5
        assert (stage.choice.name, stage.cfg.profile) == ("embedded", "embedded")
        assert plan(project, "trainer.max_steps=7")[0].cfg.trainer.max_steps == 7

    def test_a_built_in_profile_is_recorded_as_one(self, project):
        assert not plan(project, "profile=paper")[0].cfg.profile_is_builtin
        (project / "configs").mkdir()
        table = "r1-system: {also: [{profiles: {paper: {seed: 3}}}]}\n"
        (project / "configs" / "profiles.yaml").write_text(table)
        path = project / "one.yaml"
        path.write_text(path.read_text().partition("profiles:")[0])
        cfg = plan(project, "profile=paper")[0].cfg
        assert cfg.profile_is_builtin and cfg.seed == 3
        assert not plan(project)[0].cfg.profile_is_builtin, "as written"

    def test_a_prompt_may_hold_anything(self, project):
        prompt = "a cube: # [red] ${seed} 'x"
        cfg = plan(project, f"{PROMPT}={prompt}")[0].cfg
        assert cfg.system.prompt_processor.prompt == prompt
        assert cfg.trial_name.startswith("a_cube:_#_[red]_")

    def test_planning_writes_nothing(self, project):
        plan(project)
        assert sorted(p.name for p in project.iterdir()) == ["one.yaml", "two.yaml"]

    def test_the_written_out_config_of_a_run_gives_the_same_run(self, project):
        cfg = plan(project, "trainer.max_steps=7")[0].cfg
        OmegaConf.save(cfg, project / "parsed.yaml")
        again = plan(project, files=("parsed",))[0]
        assert again.cfg == cfg and not again.fresh_timestamp
        with pytest.raises(ConfigError, match="has profile 'embedded' applied already.*raw.yaml"):
            plan(project, "profile=paper", files=("parsed",))


class TestRefusals:
    @pytest.mark.parametrize(
        "argv, message",
        [
            (["trainer.max_step=1"], "command line: unknown key 'trainer.max_step'.*'max_steps'"),
            (["system.scale=wide"], "command line: wrong type for 'system.scale': 'wide' is text"),
            (["sede=1"], "unknown key 'sede'.*Did you mean 'seed'"),
            (["profile=papper"], "expected one of embedded, paper, auto .*mean 'paper'"),
            (["resume=auto"], "found nothing to resume.*'a_red_cube'"),
            (["resume=nowhere/x.ckpt"], "resume is 'nowhere/x.ckpt', but there is no such file"),
            (["system.weights=https://x/y.ckpt"], "system.weights is .* a URL"),
            (["3:seed=1"], "names stage 3; there is 1 config"),
            (["system_type="], "sets no system_type"),
            (["system.scale=${oc.env:HOME}"], "oc.env:HOME.* is refused"),
        ],
    )
    def test_one_sentence(self, project, argv, message):
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            plan(project, *argv)

    def test_a_key_of_the_file_is_named_with_its_line(self, project):
        edit(project, "one", "seeed: 3\n")
        with pytest.raises(ConfigError, match=r"one.yaml:16: unknown key 'seeed'"):
            plan(project)

    def test_a_missing_prompt(self, project):
        path = project / "one.yaml"
        path.write_text(path.read_text().replace("prompt: a red cube", "prompt: ???"))
        with pytest.raises(ConfigError, match=f'no value for {PROMPT}; give it .*: {PROMPT}="..."'):
            plan(project)
        plan(project, f"{PROMPT}=a cube")

    def test_what_a_system_supplies_itself_need_not_be_given(self, project, monkeypatch):
        """Such as the prompts of further priors, which are ``???`` in upstream's configs."""
        path = project / "one.yaml"
        more = "prompt: a red cube\n    front: ???\n    back: ???\n    side: given"
        path.write_text(path.read_text().replace("prompt: a red cube", more))
        supplied = {f"prompt_processor.{key}": f"${{{PROMPT}}}" for key in ("front", "side", "top")}
        monkeypatch.setattr(System, "supplied_values", supplied, raising=False)
        with pytest.raises(ConfigError, match="no value for system.prompt_processor.back; give it"):
            plan(project)
        prompts = plan(project, "system.prompt_processor.back=x")[0].cfg.system.prompt_processor
        assert prompts == {
            "prompt": "a red cube", "front": "a red cube", "back": "x", "side": "given",
        }  # fmt: skip
        given = plan(project, "system.prompt_processor.back=x", "system.prompt_processor.front=y")
        assert given[0].cfg.system.prompt_processor.front == "y"

    def test_a_missing_file(self, project):
        with pytest.raises(ConfigError, match="three.yaml' cannot be read: No such file"):
            plan(project, files=("three",))

    def test_an_unwritable_output_folder(self, project):
        (project / "a_file").write_text("")
        with pytest.raises(ConfigError, match="output folder .* cannot be written"):
            plan(project, f"exp_root_dir={project}/a_file/out")

    @pytest.mark.parametrize("mode", ["--test", "--validate", "--export"])
    def test_evaluation_without_weights(self, project, mode):
        with pytest.raises(ConfigError, match=f"{mode} needs weights.*resume=auto"):
            plan(project, mode=mode)
        path = checkpoint(project, "a_red_cube@20260101-000000")
        assert plan(project, f"system.weights={path}", mode=mode)[0].cfg.system.weights == str(path)

    def test_an_existing_trial_is_not_overwritten(self, project):
        checkpoint(project, "a_red_cube")
        with pytest.raises(ConfigError, match="holds a run already"):
            plan(project, "use_timestamp=false")
        plan(project, "use_timestamp=false", "resume=auto")

    def test_missing_models_stop_training_only(self, project, monkeypatch):
        asked = []
        monkeypatch.setattr(stages, "check_prompt_words", lambda cfg: None)
        monkeypatch.setattr(
            "threestudio.utils.pretrained.require_models", lambda names: asked.append(list(names))
        )
        edit(project, "one", "checkpoint: {}\n")
        path = checkpoint(project, "a_red_cube@20260101-000000")
        plan(project, "system.guidance_type=r1-guidance")
        assert asked == [["owner/real"]]
        plan(project, "system.guidance_type=r1-guidance", f"resume={path}", mode="--test")
        assert asked == [["owner/real"]]


class TestStartingPoints:
    def test_resume_auto_continues_in_the_same_folder(self, project):
        checkpoint(project, "a_red_cube@20260101-000000")
        path = checkpoint(project, "a_red_cube@20260102-000000")
        checkpoint(project, "a_red_cube_and_more@20260103-000000")
        stage = plan(project, "resume=auto")[0]
        assert stage.cfg.resume == str(path)
        assert stage.cfg.trial_dir == str(path.parent.parent)
        assert not stage.fresh_timestamp

    def test_resume_auto_looks_at_the_tag_of_this_prompt(self, project):
        checkpoint(project, "a_red_cube@20260101-000000")
        with pytest.raises(ConfigError, match="nothing to resume.*'a_dog'"):
            plan(project, "resume=auto", f"{PROMPT}=a dog")

    def test_last_is_expanded(self, project):
        path = checkpoint(project, "a_red_cube@20260101-000000")
        for key in ("resume", "system.weights"):
            cfg = plan(project, f"{key}={project}/out/one/a red cubeLAST/ckpts/last.ckpt")[0].cfg
            assert OmegaConf.select(cfg, key) == str(path)

    def test_the_profile_of_the_weights_is_taken(self, project):
        path = checkpoint(project, "a_red_cube@20260101-000000", profile="paper")
        choice = plan(project, f"system.weights={path}")[0].choice
        assert choice.name == "paper" and "recorded" in choice.reason
        assert plan(project, f"resume={path}", "profile=embedded")[0].choice.name == "embedded"


class TestChains:
    def test_values_of_a_later_stages_data_are_refused_before_the_first_begins(self, project):
        class Checking(DataModule):
            def __init__(self, cfg):
                self.cfg = cfg
                self.validate_config()

            def validate_config(self):
                if self.cfg.get("size") == 13:
                    raise ValueError("data.size is 13; expected another number.")

        registry.register("r1-checking")(Checking)
        files = ("one", "two")
        _, second = plan(project, "data_type=r1-checking", "2:data.size=12", files=files)
        assert second.cfg.data.size == 12
        with pytest.raises(ValueError, match="data.size is 13; expected another number"):
            plan(project, "data_type=r1-checking", "2:data.size=13", files=files)

    def test_each_stage_takes_the_profile_of_the_last_and_its_weights(self, project):
        first, second = plan(project, "1:profile=paper", files=("one", "two"))
        assert (first.choice.name, first.chained) == ("paper", False)
        assert (second.choice.name, second.chained) == ("paper", True)

    def test_given_weights_win(self, project):
        path = checkpoint(project, "a_red_cube@20260101-000000")
        _, second = plan(project, f"2:system.weights={path}", files=("one", "two"))
        assert not second.chained and second.cfg.system.weights == str(path)

    def test_an_override_reaches_every_stage_that_has_the_key(self, project):
        edit(project, "two", "description: only here\ncheckpoint: {save_last: true}\n")
        (project / "three.yaml").write_text(
            (project / "two.yaml").read_text().replace("r1-system", "r1-guidance")
        )
        with pytest.raises(ConfigError, match="prompt_processor"):
            plan(project, files=("three",))
        first, second = plan(
            project, "system.scale=2", "2:trainer.max_steps=3", "seed=4", files=("one", "two")
        )
        assert (first.cfg.system.scale, second.cfg.system.scale) == (2.0, 2.0)
        assert (first.cfg.trainer.max_steps, second.cfg.trainer.max_steps) == (5, 3)
        assert (first.cfg.seed, second.cfg.seed) == (4, 4)

    def test_an_override_that_reaches_no_stage_names_the_nearest_key(self, project):
        with pytest.raises(ConfigError, match="no config has the key 'system.scal'.*system.scale"):
            plan(project, "system.scal=2", files=("one", "two"))
        with pytest.raises(ConfigError, match="names stage 3; there are 2 configs"):
            plan(project, "3:seed=2", files=("one", "two"))

    def test_a_fault_in_the_last_stage_stops_the_first(self, project):
        edit(project, "two", "seeed: 3\n")
        with pytest.raises(ConfigError, match="two.yaml:16"):
            plan(project, files=("one", "two"))

    def test_resume_auto_starts_with_the_last_stage_that_has_begun(self, project):
        checkpoint(project, "a_red_cube@20260101-000000", name="one")
        path = checkpoint(project, "a_red_cube@20260102-000000", name="two")
        (only,) = plan(project, "resume=auto", files=("one", "two"))
        assert only.cfg.resume == str(path) and not only.chained

    def test_resume_of_the_first_stage_does_not_reach_the_second(self, project):
        path = checkpoint(project, "a_red_cube@20260101-000000", name="one")
        for resume in ("auto", path):
            first, second = plan(project, f"resume={resume}", files=("one", "two"))
            assert first.cfg.resume == str(path)
            assert second.cfg.resume is None and second.chained


class TestRunning:
    def run(self, project, monkeypatch, last="x.ckpt", files=("one", "two")):
        import sys

        calls = []

        def run_stage(cfg, mode, argv, verbose, config_path):
            calls.append((cfg.copy(), mode, Path(config_path).name))
            return SimpleNamespace(trial_dir=cfg.trial_dir, last_checkpoint=last and Path(last))

        trainer = SimpleNamespace(run_stage=run_stage)
        monkeypatch.setitem(sys.modules, "threestudio.launcher.trainer", trainer)
        argv = ["--config", *(str(project / f"{f}.yaml") for f in files), "--train"]
        arguments = parse_arguments(argv)
        folders = stages.run_stages(stages.plan_stages(arguments, project), arguments, argv)
        return calls, folders

    def test_weights_are_handed_on_and_folders_exist(self, project, monkeypatch):
        calls, folders = self.run(project, monkeypatch)
        assert [call[1:] for call in calls] == [("train", "one.yaml"), ("train", "two.yaml")]
        assert calls[0][0].system.get("weights") is None
        assert calls[1][0].system.weights == "x.ckpt"
        assert all(folder.is_dir() for folder in folders) and len(set(folders)) == 2

    def test_a_stage_without_a_checkpoint_ends_the_chain(self, project, monkeypatch):
        with pytest.raises(ConfigError, match="one.yaml left no checkpoint, so .*two.yaml cannot"):
            self.run(project, monkeypatch, last=None)
