"""Promise 4, the merge receipt: every planted wrong merge is caught, and a right one of any kind passes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import StageFailed
from pipeline.merging import lora, receipt
from pipeline.merging.receipt import Changed, WeightCheck, check_logits
from pipeline.merging.shards import rewrite, tensors
from pipeline.merging.update import Adapter, Arithmetic, Factor, LowRank, together
from pipeline.model import Base

WEIGHTS = "model.safetensors"
TARGETED = "model.layers.1.self_attn.q_proj.weight"
PROMPTS = ([0, 17, 400, 9, 31], [0, 5, 6, 7, 8, 9, 10, 11, 300, 301])
Tensors = dict[str, torch.Tensor]


@dataclass
class Merged:
    """A base, an adapter as peft made it, and the model that `write` makes of them."""

    base: Base
    folder: Path  # of the merged model
    source: Path  # of the adapter
    adapter: Adapter

    def write(self, adapter: Adapter, arithmetic: Arithmetic = "float32") -> None:
        changes = {
            name: lambda weight, out, update=update: update.merged(weight, arithmetic, out)
            for name, update in adapter.updates.items()
        }
        list(rewrite(self.base.folder, self.folder, changes))

    def check(
        self, adapter: Adapter | None = None, arithmetic: Arithmetic = "float32"
    ) -> tuple[dict[str, Any], list[Changed]]:
        check = WeightCheck(self.base.folder, self.folder, adapter or self.adapter, arithmetic)
        check.files()
        names = list(tensors(self.base.folder))
        assert list(check.each(names)) == names
        return check.receipt(), check.changed()

    def weights(self, adapter: Adapter | None = None, arithmetic: Arithmetic = "float32") -> dict[str, Any]:
        return self.check(adapter, arithmetic)[0]

    def logits(self, share: float, trained_over: str = "none") -> dict[str, Any]:
        return check_logits(self.base, self.folder, [self.source], PROMPTS, share, trained_over)


@pytest.fixture(scope="module")
def made_once(
    base: Base, stored_as: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path_factory: Any
) -> Callable[..., Merged]:
    @cache
    def make(dtype: torch.dtype, **options: Any) -> Merged:
        folder = tmp_path_factory.mktemp("merged")
        stored = replace(base, folder=stored_as(folder / "base", dtype))
        shutil.copytree(stored.folder, folder / "model")  # for its config.json
        source = make_adapter(stored.folder, **options)
        made = Merged(stored, folder / "model", source, lora.read(source, stored.folder))
        made.write(made.adapter)
        return made

    return make


@pytest.fixture
def merged(made_once: Callable[..., Merged], tmp_path: Path) -> Callable[..., Merged]:
    """`merged(dtype, use_dora=True, …)`: merged rightly, into a folder of this test's own."""

    def make(dtype: torch.dtype = torch.float32, **options: Any) -> Merged:
        made = made_once(dtype, **options)
        return replace(made, folder=shutil.copytree(made.folder, tmp_path / "model"))

    return make


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rsLoRA and DoRA": {"use_rslora": True, "use_dora": True},
}


def targeted(made: Merged) -> list[torch.Tensor]:
    weights = load_file(made.base.folder / WEIGHTS)
    return [weights[name] for name in made.adapter.updates]


RIGHT: list[tuple[str, torch.dtype, Arithmetic]] = [
    # each kind in each arithmetic; of the other dtypes the plainest and the one with most arithmetic
    *((kind, torch.bfloat16, arithmetic) for kind in KINDS for arithmetic in ("float32", "peft")),
    *((kind, dtype, "float32") for kind in ("LoRA", "rsLoRA and DoRA") for dtype in (torch.float32, torch.float16)),
    *(("DoRA", dtype, "peft") for dtype in (torch.float32, torch.float16)),
]


@pytest.mark.parametrize(("kind", "dtype", "arithmetic"), RIGHT, ids=str)
def test_a_right_merge_passes(
    merged: Callable[..., Merged], kind: str, dtype: torch.dtype, arithmetic: Arithmetic
) -> None:
    made = merged(dtype, **KINDS[kind])
    if arithmetic == "peft":
        made.write(made.adapter, arithmetic)
    found, changed = made.check(arithmetic=arithmetic)
    assert (found["adapter"], found["modules"], found["unchanged_tensors"]) == (kind, 28, 10)
    assert found["arithmetic"] == arithmetic and found["kinds"] == {"linear": 28}
    assert found["elements"] == sum(one.elements for one in changed) == sum(map(torch.numel, targeted(made)))
    if arithmetic == "float32" and dtype != torch.float32:  # float32's own error seldom reaches the next number
        assert found["not_nearest"] <= found["elements"] / 1000
    if dtype == torch.float32:  # it is compared in float64
        assert 0 < found["not_nearest"] == sum(one.not_nearest for one in changed) < found["elements"]
    assert (0 < found["worst_share_of_rounding_bound"] <= 1) == (found["not_nearest"] > 0)
    assert found["smallest_relative_change"] > 0.01
    each_change = sorted(one.relative_change for one in changed)
    spread = found["relative_change"]
    assert spread["least"]["value"] == pytest.approx(each_change[0], rel=1e-2)
    assert spread["median"] == pytest.approx((each_change[13] + each_change[14]) / 2, rel=1e-2)
    assert spread["most"]["value"] == pytest.approx(each_change[-1], rel=1e-2)
    assert found["rounding_share_of_update"] < (1e-5 if dtype == torch.float32 else 0.1)
    found = made.logits(found["rounding_share_of_update"])
    assert found["prompts"] == 2 and found["logits"].startswith("merged, against the base as stored + adapter")
    assert found["logits_rms_difference"] < found["logits_rms_bound"] < found["logits_rms_moved_by_adapter"] / 2


def scale_doubled(merged: Tensors, base: Tensors) -> None:
    for name in merged:
        merged[name] = base[name] + 2 * (merged[name] - base[name])


def one_module_skipped(merged: Tensors, base: Tensors) -> None:
    merged[TARGETED] = base[TARGETED].clone()


def one_element_off(merged: Tensors, base: Tensors) -> None:
    merged[TARGETED][3, 5] += 3e-6


def one_row_longer(merged: Tensors, base: Tensors) -> None:
    merged[TARGETED][7] *= 1 + 1e-4


def no_number(merged: Tensors, base: Tensors) -> None:
    merged[TARGETED][3, 5] = float("nan")


def untargeted_changed(merged: Tensors, base: Tensors) -> None:
    merged["model.norm.weight"][0] = torch.nextafter(merged["model.norm.weight"][0], torch.tensor(9.0))


def missing(merged: Tensors, base: Tensors) -> None:
    del merged["model.layers.3.mlp.down_proj.weight"]


def left_over(merged: Tensors, base: Tensors) -> None:
    merged["model.layers.3.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 4)


def coarser(merged: Tensors, base: Tensors) -> None:
    merged[TARGETED] = merged[TARGETED].bfloat16().float()


def narrower(merged: Tensors, base: Tensors) -> None:
    merged[TARGETED] = merged[TARGETED].bfloat16()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (scale_doubled, "away from base \\+ adapter"),
        (one_module_skipped, TARGETED),
        (one_element_off, f"{TARGETED} is .* × the rounding"),
        (one_row_longer, f"{TARGETED} is .* × the rounding"),
        (no_number, TARGETED),
        (coarser, f"{TARGETED} is .* × the rounding"),
        (narrower, f"{TARGETED} has another dtype"),
        (untargeted_changed, "model.norm.weight is not targeted by the adapter and changed"),
        (missing, "other tensors than the base"),
        (left_over, "other tensors than the base"),
    ],
)
def test_a_wrong_tensor_is_caught(
    merged: Callable[..., Merged], kind: str, fault: Callable[[Tensors, Tensors], None], said: str
) -> None:
    made = merged(**KINDS[kind])
    made.weights()  # the honest one passes
    tensors = load_file(made.folder / WEIGHTS)
    fault(tensors, load_file(made.base.folder / WEIGHTS))
    save_file(tensors, made.folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=said):
        made.weights()


def each(adapter: Adapter, change: Callable[[LowRank], dict[str, Any]]) -> Adapter:
    return replace(adapter, updates={n: replace(update, **change(update)) for n, update in adapter.updates.items()})  # type: ignore[type-var, arg-type]


def each_factor(adapter: Adapter, change: Callable[[Factor], dict[str, Any]]) -> Adapter:
    return each(adapter, lambda update: {"factors": tuple(replace(f, **change(f)) for f in update.factors)})


def twice_the_scale(adapter: Adapter) -> Adapter:
    return each_factor(adapter, lambda factor: {"scale": factor.scale * 2})


def alpha_over_rank(adapter: Adapter) -> Adapter:
    """As if rsLoRA were LoRA."""
    return each_factor(adapter, lambda factor: {"scale": 16 / 8})


def no_magnitude(adapter: Adapter) -> Adapter:
    """As if DoRA were LoRA."""
    return each(adapter, lambda update: {"magnitude": None})


def magnitude_changed(adapter: Adapter) -> Adapter:
    return each(adapter, lambda update: {"magnitude": update.magnitude * 1.1})


def magnitude_by_row_reversed(adapter: Adapter) -> Adapter:
    return each(adapter, lambda update: {"magnitude": update.magnitude.flip(0)})


def two_layers_exchanged(adapter: Adapter) -> Adapter:
    first, second = "model.layers.0.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"
    updates = dict(adapter.updates)
    return replace(adapter, updates=updates | {first: updates[second], second: updates[first]})


MISREAD = [  # each in bfloat16, whose rounding has the wider bound; two in float32 too
    ("LoRA", twice_the_scale, torch.float32),
    ("LoRA", twice_the_scale, torch.bfloat16),
    ("LoRA", two_layers_exchanged, torch.bfloat16),
    ("rsLoRA", alpha_over_rank, torch.bfloat16),
    ("DoRA", twice_the_scale, torch.bfloat16),
    ("DoRA", no_magnitude, torch.bfloat16),
    ("DoRA", magnitude_changed, torch.float32),
    ("DoRA", magnitude_changed, torch.bfloat16),
    ("DoRA", magnitude_by_row_reversed, torch.bfloat16),
]


@pytest.mark.parametrize(("kind", "fault", "dtype"), MISREAD)
def test_an_adapter_read_wrongly_is_caught_by_the_logits(
    merged: Callable[..., Merged], kind: str, fault: Callable[[Adapter], Adapter], dtype: torch.dtype
) -> None:
    """What is written then agrees with what was read, and only peft knows better."""
    made = merged(dtype, **KINDS[kind])
    made.logits(made.weights()["rounding_share_of_update"])
    wrong = fault(made.adapter)
    made.write(wrong)
    share = made.weights(wrong)["rounding_share_of_update"]
    with pytest.raises(StageFailed, match=r"merged logits differ from base \+ adapter by .* more than"):
        made.logits(share)
    with pytest.raises(StageFailed, match="away from base"):  # and written so, it does not agree with what was read
        made.weights()


def test_logits_computed_in_16_bits_still_tell_a_wrong_scale(
    merged: Callable[..., Merged], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model in float32 does not fit in memory."""
    made = merged(torch.bfloat16, use_dora=True)
    stored = receipt.size(made.folder)
    monkeypatch.setattr(receipt, "_fits", lambda weights, device: weights <= stored)
    found = made.logits(made.weights()["rounding_share_of_update"])
    assert found["logits"].endswith("computed in the stored dtype")
    made.write(wrong := no_magnitude(made.adapter))
    with pytest.raises(StageFailed, match="merged logits differ"):
        made.logits(made.weights(wrong)["rounding_share_of_update"])
    monkeypatch.setattr(receipt, "_fits", lambda weights, device: False)
    assert made.logits(0.0) == {"logits": "not compared: the model does not fit in memory"}


def test_a_targeted_module_that_did_not_change_is_caught(merged: Callable[..., Merged], tmp_path: Path) -> None:
    """An adapter of zeros would pass every comparison with base + adapter; it makes +0 of -0, which is no change."""
    made = merged()
    made.base = replace(made.base, folder=shutil.copytree(made.base.folder, tmp_path / "base"))
    tensors = load_file(made.base.folder / WEIGHTS)
    for name in made.adapter.updates:
        tensors[name][0] = -0.0
    save_file(tensors, made.base.folder / WEIGHTS, metadata={"format": "pt"})
    nothing = each_factor(made.adapter, lambda factor: {"b": torch.zeros_like(factor.b)})
    made.write(nothing)
    with pytest.raises(StageFailed, match="targeted by the adapter and did not change"):
        made.weights(nothing)


def test_rows_of_zeros_and_numbers_below_the_smallest_normal_are_no_fault(
    merged: Callable[..., Merged], tmp_path: Path
) -> None:
    """There half a unit in the last place is no share of the number."""
    made = merged(torch.float16)
    made.base = replace(made.base, folder=shutil.copytree(made.base.folder, tmp_path / "base"))
    tensors = load_file(made.base.folder / WEIGHTS)
    tensors[TARGETED][:5] = 0
    tensors[TARGETED][5:20] = torch.randn(15, 128).mul(1e-6).half()
    save_file(tensors, made.base.folder / WEIGHTS, metadata={"format": "pt"})
    factor = made.adapter.updates[TARGETED].factors[0]  # type: ignore[attr-defined]
    b = torch.cat([factor.b[:3] * 0, factor.b[3:20] * 1e-5, factor.b[20:]])
    small = replace(made.adapter, updates={**made.adapter.updates, TARGETED: LowRank((replace(factor, b=b),))})
    made.write(small)
    assert made.weights(small)["worst_share_of_rounding_bound"] <= 1


def test_an_update_that_rounding_hides_is_said(
    merged: Callable[..., Merged], capsys: pytest.CaptureFixture[str]
) -> None:
    made = merged(torch.bfloat16)
    for less, said in ((100, "hides "), (2000, "hides nearly all of what the adapter changes; serve it unmerged")):
        small = each_factor(made.adapter, lambda factor, less=less: {"b": factor.b / less})
        made.write(small)
        assert (made.weights(small)["rounding_share_of_update"] > 0.9) == (less == 2000)
        assert f"note: rounding to the base's dtype {said}" in capsys.readouterr().err


def test_what_is_not_finite_is_called_so(merged: Callable[..., Merged]) -> None:
    made = merged(torch.bfloat16)
    broken = each_factor(made.adapter, lambda factor: {"b": factor.b * float("inf")})
    made.write(broken)
    with pytest.raises(StageFailed, match=r"proj\.weight holds NaN or infinity"):
        made.weights(broken)


@pytest.mark.parametrize(("quantization", "dora"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_an_adapter_trained_over_a_quantised_base_goes_into_the_full_one(
    merged: Callable[..., Merged], make_adapter: Callable[..., Path], quantization: str, dora: bool
) -> None:
    made = merged()
    quantised = receipt.load_model(made.base.folder, made.base, quantization)
    made.source = make_adapter(made.base.folder, model=quantised, use_dora=dora)
    made.adapter = lora.read(made.source, made.base.folder)
    made.write(made.adapter)
    found = made.logits(made.weights()["rounding_share_of_update"], quantization)
    assert found["logits"].startswith("merged, against the base as stored + adapter")
    assert found["trained_over"] == quantization
    assert found["logits_rms_difference"] < 1e-4  # of the full base
    assert 1e-4 < found["kl_from_trained_nats_a_token"] < 1  # and not of the quantised one


def test_a_quantised_layer_that_does_not_run_here_fails_no_merge(
    merged: Callable[..., Merged], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, honest = merged(), receipt.load_model

    def broken(folder: Path, base: Base, quantization: str = "none") -> Any:
        if quantization == "int8":
            raise AttributeError("'NoneType' object has no attribute 'dtype'")  # bitsandbytes, of DoRA on a CPU
        return honest(folder, base, quantization)

    monkeypatch.setattr(receipt, "load_model", broken)
    found = made.logits(made.weights()["rounding_share_of_update"], "int8")
    assert found["logits_rms_difference"] < 1e-4
    assert (found["trained_over"], found["kl_from_trained_nats_a_token"]) == ("int8", None)
    assert "note: the model as trained over int8 cannot run here (AttributeError: " in capsys.readouterr().err


@pytest.mark.parametrize("arithmetic", ["float32", "peft"])
def test_several_adapters_are_checked_as_their_sum(
    merged: Callable[..., Merged], make_adapter: Callable[..., Path], arithmetic: Arithmetic
) -> None:
    made = merged(torch.bfloat16)
    other = make_adapter(made.base.folder, r=4, use_rslora=True, target_modules=["q_proj", "up_proj"])
    read = [made.adapter, lora.read(other, made.base.folder)]
    both, sources = together(read, ["one", "other"]), [made.source, other]
    made.write(both, arithmetic)
    found = made.weights(both, arithmetic)
    assert (found["adapter"], found["modules"]) == ("LoRA + rsLoRA", 28)
    share = found["rounding_share_of_update"]
    check_logits(made.base, made.folder, sources, PROMPTS, share, "none")

    with pytest.raises(StageFailed, match="merged logits differ"):  # peft knows of two
        check_logits(made.base, made.folder, sources[:1], PROMPTS, share, "none")
    made.write(made.adapter, arithmetic)
    with pytest.raises(StageFailed, match="away from base"):
        made.weights(both, arithmetic)
    with pytest.raises(StageFailed, match="merged logits differ"):
        check_logits(made.base, made.folder, sources, PROMPTS, share, "none")


def test_tokens_rows_alone_may_change(merged: Callable[..., Merged], make_adapter: Callable[..., Path]) -> None:
    made, name = merged(torch.bfloat16), "model.embed_tokens.weight"
    source = make_adapter(made.base.folder, trainable_token_indices=[5, 300], target_modules=["q_proj"])
    read = lora.read(source, made.base.folder)
    rows = read.updates[name]
    trained = replace(rows, values=rows.values + 0.02)  # type: ignore[type-var, attr-defined]
    adapter = replace(read, updates={**read.updates, name: trained})
    made.write(adapter)
    found, changed = made.check(adapter)
    assert found["kinds"] == {"linear": 4, "tokens": 1}
    assert [one.kind for one in changed if one.tensor == name] == ["tokens"]
    tensors = load_file(made.folder / WEIGHTS)
    tensors[name][6, 0] = torch.nextafter(tensors[name][6, 0], torch.tensor(9.0).bfloat16())
    save_file(tensors, made.folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=f"{name} is .* × the rounding"):
        made.weights(adapter)


def test_a_merge_into_the_quantised_base_is_caught(merged: Callable[..., Merged]) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = merged()

    def rounded(weight: Any, out: torch.Tensor, name: str) -> Any:
        return made.adapter.updates[name].merged(dequantize_4bit(*quantize_4bit(weight[:], quant_type="nf4")))

    list(rewrite(made.base.folder, made.folder, {n: partial(rounded, name=n) for n in made.adapter.updates}))
    with pytest.raises(StageFailed, match="away from base"):
        made.weights()
    with pytest.raises(StageFailed, match="merged logits differ"):
        made.logits(0.0)
