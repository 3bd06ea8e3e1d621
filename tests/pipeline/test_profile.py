from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.profile import Profile, load_profile, settings
from pipeline.workspace import CHECKOUT, Workspace

HEAD = "name: mine\nbase_model: tiny\n"
SHIPPED = sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml"))


@pytest.fixture
def root(tmp_path: Path) -> Workspace:
    (tmp_path / "configs").mkdir()
    return Workspace(tmp_path)


def load(root: Workspace, text: str, *assignments: str) -> Profile:
    (root.configs / "mine.yaml").write_text(text, "utf-8")
    return load_profile(root, "mine", list(assignments))


def refusal(root: Workspace, text: str, *assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(root, text, *assignments)
    return str(caught.value)


def test_the_two_profiles_are_shipped() -> None:
    assert SHIPPED == ["deepseek-coder-7b", "tiny"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_every_value_is_where_it_says(name: str) -> None:
    profile = load_profile(Workspace(CHECKOUT), name)
    lines = (CHECKOUT / "configs" / f"{name}.yaml").read_text("utf-8").splitlines()
    given = 0
    for key, _, _ in settings(profile.config):
        where, _, line = profile.origin(key).partition(":")
        if where != "default":
            assert where == f"configs/{name}.yaml"
            assert f"{key.rpartition('.')[2]}:" in lines[int(line) - 1]
            given += 1
    assert given > 20


@pytest.mark.parametrize("name", SHIPPED)
def test_the_rate_of_a_shipped_profile_is_a_number(name: str) -> None:
    rate = load_profile(Workspace(CHECKOUT), name).config.sft_config.learning_rate
    assert rate == {"tiny": 2e-3, "deepseek-coder-7b": 2e-4}[name]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "sft_config:\n  epochs: 1.0\n  lora_rnak: 8\n",
            "configs/mine.yaml:5: sft_config.lora_rnak: there is no such key; try `lora_rank`",
        ),
        (
            "dpo_config: {learning_rate: 1e-5, bta: 0.1}\n",
            "configs/mine.yaml:3: dpo_config.bta: there is no such key; try `beta`",
        ),
        ("sft_confg: {}\n", "configs/mine.yaml:3: sft_confg: there is no such key; try `sft_config`"),
        (
            "# it stands elsewhere\nbeta: 0.1\n",
            "configs/mine.yaml:4: beta: there is no such key; try `dpo_config.beta`",
        ),
        (
            "dpo_config: {label_smoothing: 0.1}\n",
            "configs/mine.yaml:3: dpo_config: label_smoothing is used by loss_type robust alone",
        ),
        (
            "xyzzy: 1\n",
            "configs/mine.yaml:3: xyzzy: there is no such key; try `aletheia config explain` for all keys",
        ),
        (
            "sft_config:\n  learning_rate: 2e-4\n  lora_rank: 1.5\n",
            "configs/mine.yaml:5: sft_config.lora_rank: must be integer, not 1.5",
        ),
        (
            "sft_config:\n  learning_rate: '2e-4'\n",
            "configs/mine.yaml:4: sft_config.learning_rate: must be number, not '2e-4' (write 2e-4 without quotes)",
        ),
        (
            "training_data:\n  validation:\n    fraction: 1.5\n",
            "configs/mine.yaml:5: training_data.validation.fraction: must be less than 1, not 1.5",
        ),
        (
            "eval_config:\n  tasks:\n    - a\n    - 7\n",
            "configs/mine.yaml:6: eval_config.tasks.1: must be string, not 7",
        ),
        ("cost: {kwh: .inf}\n", "configs/mine.yaml:3: cost.kwh: must be a finite number, not inf"),
        ("seed: 1\nname: other\n", "configs/mine.yaml:4:1: the key `name` stands twice"),
        ("sft_config: {epochs: 1.0\n", "configs/mine.yaml:4:1: did not find expected ',' or '}'"),
    ],
)
def test_a_mistake_names_file_line_key_and_the_nearest_key(root: Workspace, body: str, expected: str) -> None:
    assert refusal(root, HEAD + body) == expected


def test_a_name_that_cannot_be_a_link_is_refused(root: Workspace) -> None:
    assert refusal(root, "base_model: tiny\nname: a/b\n").startswith("configs/mine.yaml:2: name: String should match")


def test_a_missing_key_is_named(root: Workspace) -> None:
    assert refusal(root, "name: x\n") == "configs/mine.yaml: base_model: is missing; try a line `base_model: …`"


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_profile_that_is_no_mapping_is_refused(root: Workspace, text: str) -> None:
    assert "a profile is a mapping" in refusal(root, text)


def test_a_file_that_is_not_utf8_is_refused(root: Workspace) -> None:
    (root.configs / "mine.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"configs/mine\.yaml: cannot be read"):
        load_profile(root, "mine")


def test_set_stands_over_the_file_and_says_so(root: Workspace) -> None:
    text = HEAD + "sft_config:\n  learning_rate: 2e-4\n  epochs: 3.0\n"
    profile = load(root, text, "sft_config.learning_rate=1e-3", "dpo_config.beta=0.3", "seed=1", "seed=2")
    assert profile.config.sft_config.learning_rate == 1e-3
    assert profile.config.sft_config.epochs == 3.0
    assert profile.config.dpo_config.beta == 0.3
    assert profile.config.seed == 2
    assert profile.overrides == {"sft_config.learning_rate": 1e-3, "dpo_config.beta": 0.3, "seed": 2}
    assert profile.origin("sft_config.learning_rate") == "--set"
    assert profile.origin("dpo_config.beta") == "--set"
    assert profile.origin("sft_config.epochs") == "configs/mine.yaml:5"
    assert profile.origin("sft_config.lora_rank") == "default"


def test_a_section_set_whole_comes_from_set(root: Workspace) -> None:
    profile = load(root, HEAD + "sft_config:\n  epochs: 3.0\n", "sft_config={lora_rank: 8}")
    assert profile.config.sft_config.lora_rank == 8
    assert profile.config.sft_config.epochs == 2.0
    assert profile.origin("sft_config.lora_rank") == "--set"
    assert profile.origin("seed") == "default"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("sft_config.lora_rnak=8", "--set: sft_config.lora_rnak: there is no such key; try `lora_rank`"),
        ("sft_config.lora_rank=x", "--set: sft_config.lora_rank: must be integer, not 'x'"),
        ("sft_config={lora_rank: -1}", "--set: sft_config.lora_rank: must be greater than 0, not -1"),
        ("a.b=1", "--set: a: there is no such key; try `aletheia config explain` for all keys"),
        ("seed.x=1", "--set: seed.x: `seed` is a value, not a section"),
        (
            "sft_config.lora_rank",
            "--set: `sft_config.lora_rank` is not KEY=VALUE; try --set sft_config.learning_rate=1e-4",
        ),
        ("=8", "--set: `=8` is not KEY=VALUE; try --set sft_config.learning_rate=1e-4"),
        ("eval_config.tasks=[a", "--set: eval_config.tasks: the value is not YAML: did not find expected ',' or ']'"),
    ],
)
def test_a_mistake_in_set_is_blamed_on_set(root: Workspace, assignment: str, expected: str) -> None:
    assert refusal(root, HEAD + "seed: 3\n", assignment) == expected


def test_an_error_about_a_value_stands_where_the_value_was_given(root: Workspace) -> None:
    profile = load(root, HEAD + "sft_config:\n  epochs: 3.0\n", "seed=1")
    for key, where in (
        ("sft_config.epochs", "configs/mine.yaml:4"),
        ("seed", "--set"),
        ("device", "configs/mine.yaml"),
    ):
        assert str(profile.error(key, "is wrong", "another")) == f"{where}: {key}: is wrong; try another"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("mien", "--profile mine"), ("nothing-like-it", "one of: mine"), ("other/x.yaml", "one of: mine")],
)
def test_a_profile_that_is_not_there_names_those_that_are(root: Workspace, name: str, remedy: str) -> None:
    (root.configs / "mine.yaml").write_text(HEAD)
    with pytest.raises(UserError, match=f"no profile `{name}`; try {remedy}"):
        load_profile(root, name)


def test_a_profile_is_found_by_name_by_path_and_from_the_root(root: Workspace) -> None:
    (root.configs / "mine.yaml").write_text(HEAD)
    found = {load_profile(root, name).path for name in ("mine", "configs/mine.yaml", str(root.configs / "mine.yaml"))}
    assert found == {root.configs / "mine.yaml"}
