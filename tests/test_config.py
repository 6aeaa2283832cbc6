import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from uhml import cli
from uhml.commands.options import overridden
from uhml.config import (
    FREE_TO_CHANGE,
    Config,
    check_batch_fits,
    describe_keys,
    dump_config,
    load_config,
    parse_dump,
    quoted,
)
from uhml.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
SECTIONS = {field.name: field.type for field in dataclasses.fields(Config)}
KEYS = [(section, field.name) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def file(tmp_path):
    """Write a config file and return its path."""

    def write(text):
        path = tmp_path / "some.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        "/x/\U0001f600",
        'a"b\\c',
        "a${b}",
        r"\${oc.env:HOME}\\",
        "${",
        "$",
        "1e5",
        "\x7f\x85 \u00e9",
        " x ",
        "",
    ],
)
def test_a_quoted_value_stands_for_just_this_text_from_then_on(file, text):
    override = f"model.init_from={quoted(text)}"
    config = load_config(file("data: {dataset: folder}\n"), [override, "data.root=x"])
    assert config.model.init_from == text
    assert parse_dump(dump_config(config)) == load_config(file(dump_config(config))) == config
    override = f"data.root={quoted(text)}"
    assert overridden(config, [override]).data.root == text
    assert overridden(overridden(config, [override]), []).data.root == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no YAML: "), ("- 1", "is no mapping"), (5, "is no YAML"), ("data: {rot: x}", "data.root")],
)
def test_what_a_stranger_calls_a_config(text, said):
    with pytest.raises(UserError, match=said):
        parse_dump(text)


def test_too_few_pictures_for_any_batch():
    with pytest.raises(UserError, match=r"of 3 training pictures there are too few, for it takes at least 8\."):
        check_batch_fits(3, Config(), 1)


# Files


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_that_comes_with_uhml_is_right(path, monkeypatch):
    config = load_config(path, ["data.root=/some/where"])
    monkeypatch.setenv("RANK", "0")
    for world_size in ("1", "2", "4"):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        load_config(path, ["data.root=/some/where"])
    assert config.clusters_per_batch >= 2
    # The others are named after their data set.
    layouts = {"quickstart": "glyphs", "omniglot": "sop", "cars196-small": "cars196"}
    assert config.data.dataset == layouts.get(path.stem, path.stem)
    if config.data.dataset != "glyphs":
        assert "data.root is missing" in refusal(path)


@pytest.mark.parametrize("name", ["list", "shards"])
def test_pictures_of_ones_own_are_learned_from_alike_however_they_are_kept(name):
    as_folder, found = (load_config(CONFIGS / f"{n}.yaml", ["data.root=x"]) for n in ("folder", name))
    assert dataclasses.replace(found, data=dataclasses.replace(found.data, dataset="folder")) == as_folder


def test_there_are_configs():
    names = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert {f"{name}.yaml" for name in ("quickstart", "folder", "cub200", "cars196", "sop", "inshop")} <= names
    assert any(name.startswith("paper/") for name in names)


def test_a_file_changes_what_it_says_and_leaves_the_rest(file):
    config = load_config(file("train: {seed: 7}\nhierarchy:\n  cut_by: counts\n  cuts: [30, 5]\n"))
    default = Config()
    assert config.train == dataclasses.replace(default.train, seed=7)
    assert config.hierarchy == dataclasses.replace(default.hierarchy, cut_by="counts", cuts=(30, 5))
    assert (config.data, config.model, config.loss) == (default.data, default.model, default.loss)
    assert load_config(file("")) == default


def test_overrides_win_over_the_file_and_are_yaml(file):
    path = file("train: {seed: 7, num_steps: 5}\ndata: {num_classes: 3}\n")
    overrides = ["train.seed=8", "data.num_classes=null", "hierarchy.cut_by=heights", "hierarchy.cuts=[0.5, 2]"]
    config = load_config(path, [*overrides, "data.augment_flip=false", "optim.learning_rate=1e-3", "data.root=a=b"])
    assert (config.train.seed, config.train.num_steps, config.data.num_classes) == (8, 5, None)
    assert (config.hierarchy.cuts, config.data.augment_flip) == ((0.5, 2), False)
    assert (config.optim.learning_rate, config.data.root) == (1e-3, "a=b")


def test_what_is_dumped_is_loaded_again(file):
    overrides = ["data.dataset=list", "data.root=/a b/ü.csv", "hierarchy.cut_by=heights", "hierarchy.cuts=[0.1, 2]"]
    for config in (Config(), load_config(file(""), [*overrides, "model.curvature=1e-5", "eval.recall_at=[1, 10]"])):
        text = dump_config(config)
        assert load_config(file(text)) == config
        # All of it, so that a run's own file says what ran whatever the defaults become.
        assert all(f"  {key}:" in text for _, key in KEYS)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_survives_the_round_trip(path, file):
    config = load_config(path, ["data.root=/some/where"])
    assert load_config(file(dump_config(config))) == config


# Mistakes


@pytest.mark.parametrize("source", ["file", "command line"])
@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("train", "num_stps", "num_steps'?"),
        ("data", "rooot", "root'?"),
        ("hierarchy", "cuts_by", "cut_by'?"),
        ("tain", "num_steps", "Did you mean 'train'?"),
        (None, "num_steps", "Did you mean 'train.num_steps'?"),
        (None, "omega", "Did you mean 'loss.omega'?"),
        (None, "zzzzzz", "Unknown key: 'zzzzzz'."),
        ("model", "zzzzzz", "Unknown key: 'model.zzzzzz'."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(file, source, section, key, hint):
    name = key if section is None else f"{section}.{key}"
    if source == "file":
        message = refusal(file(f"{key}: 1\n" if section is None else f"{section}:\n  {key}: 1\n"))
    else:
        message = refusal(file(""), f"{name}=1")
    assert f"Unknown key: '{section if section == 'tain' else name}'." in message
    assert hint in message


@pytest.mark.parametrize(
    "override",
    [
        "data.dataset=cub20",
        "data.image_size=15",
        "data.image_size=1000000",
        "data.center_crop=1e-30",
        "data.augment_ratio=[0.5, 1e300]",
        "data.augment_color=1e300",
        "model.embedding_dim=2147483648",
        "mining.clusters_together=9223372036854775808",
        "train.num_steps=9223372036854775808",
        "eval.batch_size=9223372036854775808",
        "data.center_crop=0",
        "data.center_crop=1.1",
        "data.augment_scale=[0.2, 1.5]",
        "data.augment_scale=0.5",
        "data.augment_color=-1",
        "data.augment_gray=1.1",
        "data.num_workers=-1",
        "data.num_classes=0",
        "data.skip_corrupt=perhaps",
        "data.root.deeper=1",
        "model.embedding_dim=0",
        "model.embedding_dim=12.0",
        "model.embedding_dim=true",
        "model.curvature=-0.1",
        "model.curvature=.inf",
        "model.curvature=100",
        "model.clip_radius=0",
        "model.clip_radius=.nan",
        "model.head_init=whitened",
        "model.precision=float16",
        "model.weights=null",
        "hierarchy.recluster_every=0",
        "hierarchy.mode=exakt",
        "hierarchy.geometry=euclid",
        "hierarchy.num_neighbors=0",
        "hierarchy.exact_search_up_to=1e5",
        "hierarchy.min_recall=0",
        "hierarchy.min_recall=1.1",
        "hierarchy.cuts=[]",
        "hierarchy.cuts=0.9",
        "mining.num_views=3",
        "mining.pictures_per_cluster=0",
        "loss.omega=0",
        "loss.omega=1",
        "loss.omega=1.25",
        "optim.learning_rate=0",
        "optim.learning_rate=fast",
        "optim.warmup_steps=-1",
        "optim.schedule=linear",
        "optim.gradient_clip=0",
        "train.num_steps=1e3",
        "train.num_steps=-1",
        "train.seed=-1",
        "train.seed=4294967296",
        "train.device=gpu",
        "train.log_every=0",
        "train.checkpoint_every=0",
        "eval.recall_at=[]",
        "eval.recall_at=[0]",
        "eval.batch_size=0",
        "model.curvature=true",
        "hierarchy.cuts=[true]",
        "hierarchy.cuts=[0.5, false]",
        "mining.num_views=true",
        "loss.omega='0.5'",
        "optim.learning_rate=true",
        "optim.weight_decay=false",
        "data.center_crop=true",
        "data.augment_scale=[0.2, true]",
        "eval.recall_at=[true]",
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_its_key(file, override):
    section, _, rest = override.partition(".")
    key, _, value = rest.partition("=")
    name = f"{section}.{key.split('.')[0]}"
    assert name in refusal(file(""), override)
    if "deeper" not in override:
        assert name in refusal(file(f"{section}: {{{key}: {value}}}\n"))


def test_a_wrong_choice_gets_the_nearest_right_one(file):
    assert "Did you mean 'cub200'?" in refusal(file(""), "data.dataset=cub20")


def test_all_mistakes_are_told_at_once(file):
    message = refusal(file("train: {num_stps: 3}\n"), "loss.omega=2", "data.dataset=cub20")
    assert all(word in message for word in ("train.num_stps", "loss.omega=2", "data.dataset=cub20"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.global_batch_size=130"], "train.global_batch_size=130 must be a multiple of"),
        (["train.global_batch_size=8"], "at least 16"),
        (["eval.recall_at=[1,2,1]"], "eval.recall_at=[1, 2, 1] names a number twice"),
        (["data.dataset=sop"], "data.root is missing: give the folder of data.dataset=sop"),
        (["data.dataset=list"], "data.root is missing: give the file with the list"),
        (["data.augment_scale=[0.9, 0.2]"], "go from the least to the greatest"),
        (["data.augment_ratio=[2, 1]"], "go from the least to the greatest"),
        (["model.curvature=4"], "model.clip_radius=2.3 reaches so far to the edge of the ball of model.curvature=4.0"),
        (["model.clip_radius=12"], "take at most 9.8"),
        (["model.head_init=orthogonal"], "take model.head_init=whitened_pca, or model.projector=false"),
        (["model.backbone=resnet50"], "model.weights=package is for tf_efficientnet_lite0, tf_efficientnet_lite1, tf_"),
        (["hierarchy.cut_by=counts", "hierarchy.cuts=[10, 100]"], "must fall"),
        (["hierarchy.cut_by=counts", "hierarchy.cuts=[10, 10]"], "must fall"),
        (["hierarchy.cut_by=counts", "hierarchy.cuts=[10.5, 3]"], "whole"),
        (["hierarchy.cut_by=counts", "hierarchy.cuts=[10, 0]"], "at least 1"),
        (["hierarchy.cut_by=heights", "hierarchy.cuts=[2, 1]"], "heights must rise"),
        (["hierarchy.cut_by=heights", "hierarchy.cuts=[-1, 1]"], "not negative"),
        (["hierarchy.cut_by=quantiles", "hierarchy.cuts=[0.9, 0.5]"], "quantiles must rise"),
        (["hierarchy.cut_by=quantiles", "hierarchy.cuts=[0.9, 1.5]"], "between 0 and 1"),
    ],
)
def test_contradictions_are_refused(file, overrides, words):
    assert words in refusal(file(""), *overrides)


@pytest.mark.parametrize("override", ["model.curvature=1", "model.curvature=0", "model.clip_radius=9"])
def test_points_that_float32_can_tell_apart_are_allowed(file, override):
    load_config(file(""), [override])


def test_a_batch_must_divide_among_the_ranks(file, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "train.global_batch_size=128 must be a multiple of the 3 ranks" in refusal(file(""))


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "5\n", "data: [1, 2]\n", "data: {", "data: {root: a, root: b}\n", b"\xff"]
)
@pytest.mark.parametrize("overrides", [[], ["data.root=x"]], ids=["alone", "with an override"])
def test_a_file_that_is_no_mapping_of_sections_is_refused(file, text, overrides):
    path = file(text)
    assert str(path) in refusal(path, *overrides)


@pytest.mark.parametrize("override", ["data.root", "--seed=3", "=3", "data.root=[", "data.root=${nowhere}", "data=3"])
def test_what_is_no_override_is_refused(file, override):
    assert refusal(file(""), override)


def test_a_file_that_is_not_there_gets_the_nearest_with_its_folder(tmp_path, monkeypatch):
    quickstart = str(CONFIGS / "quickstart.yaml")
    assert f"Did you mean {quickstart!r}?" in refusal(CONFIGS / "quikstart.yaml")
    message = refusal(CONFIGS / "zzzz")
    assert quickstart in message
    assert "Did you mean" not in message
    monkeypatch.chdir(tmp_path)
    assert refusal("/nowhere/at/all.yaml") == "There is no config file /nowhere/at/all.yaml."
    # Both the folder that was named and configs/ here are looked into.
    monkeypatch.chdir(CONFIGS.parent)
    for typed in ("quickstart.yaml", "quickstart", "nowhere/quikstart.yml", CONFIGS / "paper" / "quickstrat.yaml"):
        assert "Did you mean 'configs/quickstart.yaml'?" in refusal(typed)
    (tmp_path / "mine.yaml").touch()
    assert f"Did you mean {str(tmp_path / 'mine.yaml')!r}?" in refusal(tmp_path / "mien.yaml")


# The manual and the command line


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_is_in_the_manual_with_its_docstring_and_default(section, key):
    description = SECTIONS[section].__pydantic_fields__[key].description
    assert description, "a field without a docstring"
    assert description.strip().endswith(".")
    manual = " ".join(describe_keys().split())
    default = getattr(SECTIONS[section](), key)
    shown = "" if isinstance(default, tuple) else "null" if default is None else str(default)
    shown = shown.lower() if isinstance(default, bool) else shown
    assert f"{section}.{key}={shown}" in manual
    assert " ".join(description.split()) in manual


def test_the_manuals_defaults_are_good_overrides(file):
    lines = [line.split("   [")[0].strip() for line in describe_keys().splitlines()]
    overrides = [line for line in lines if line.partition("=")[0] in {f"{s}.{k}" for s, k in KEYS} and "=" in line]
    assert len(overrides) == len(KEYS)
    assert load_config(file(""), overrides) == Config()


def test_help_holds_the_manual(capsys):
    for arguments in (["--help"], ["train", "--help"], ["cluster", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert arguments[0] != "train" or describe_keys().strip() in printed


def test_options_may_stand_anywhere_among_the_overrides(file, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("uhml.train.train", lambda *arguments: started.append(arguments))
    path, run_dir = str(file("")), tmp_path / "run"
    rests = [
        [path, "train.seed=3", "data.num_classes=2", "--run-dir", str(run_dir)],
        [path, "--run-dir", str(run_dir), "train.seed=3", "data.num_classes=2"],
        ["--run-dir", str(run_dir), path, "train.seed=3", "data.num_classes=2"],
        [path, "train.seed=3", "--run-dir", str(run_dir), "data.num_classes=2"],
        [
            *(path, "--allow-change", "train.seed,optim.learning_rate"),
            *("train.seed=3", "data.num_classes=2", "--run-dir", str(run_dir)),
        ],
    ]
    for rest in rests:
        assert cli.main(["train", *rest]) == 0
    config = load_config(path, ["train.seed=3", "data.num_classes=2"])
    allowed = [[]] * 4 + [["train.seed", "optim.learning_rate"]]
    assert started == [(config, run_dir, False, keys) for keys in allowed]


def test_what_may_change_unasked_are_keys_that_there_are():
    assert {f"{section}.{key}" for section, key in KEYS} > FREE_TO_CHANGE


def test_a_mistyped_key_ends_with_status_2_and_one_line():
    command = [sys.executable, "-m", "uhml", "train", str(CONFIGS / "quickstart.yaml"), "train.num_stps=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "error: Unknown key: 'train.num_stps'." in line


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("train.num_steps: 3", [], "In a file it stands in its section, as in train: {num_steps: ...}."),
        ("foo.bar: 1", [], "Unknown key: 'foo.bar'. The sections are data, model,"),
        (
            "",
            ["hierarchy.cuts=0.9"],
            "hierarchy.cuts must be a list of numbers, as in hierarchy.cuts=[0.9, 0.975, 0.995].",
        ),
        ("", ["hierarchy.cuts=[]"], "hierarchy.cuts must be a list of numbers, as in"),
        ("", ["hierarchy.cuts=[a]"], "hierarchy.cuts must be a list of numbers, as in"),
        (
            "",
            ["data.augment_scale=[0.5]"],
            "data.augment_scale must be a list of 2 numbers, as in data.augment_scale=[0.2, 1.0].",
        ),
        ("", ["data.augment_scale=[0.5,1,2]"], "data.augment_scale must be a list of 2 numbers, as in"),
        (
            "",
            ["eval.recall_at=[1.5]"],
            "eval.recall_at must be a list of whole numbers, as in eval.recall_at=[1, 2, 4, 8].",
        ),
        ("", ["eval.recall_at=[0]"], "greater than"),
    ],
)
def test_keys_written_in_another_form_are_told_theirs(tmp_path, text, overrides, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(path, overrides)
    assert said in str(refused.value)
    assert "tuple" not in str(refused.value)


def test_what_is_not_alike_is_not_suggested(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {device: gpu}")
    with pytest.raises(UserError, match=r"train\.device=gpu: input should be 'auto', 'cpu' or 'cuda'\. \(Read"):
        load_config(path)
    path.write_text("data: {dataset: cub}")
    with pytest.raises(UserError, match="Did you mean 'cub200'"):
        load_config(path)
