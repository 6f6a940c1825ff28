"""Optimiser state in new coordinates: against training of the rotated problem, for every optimiser that is listed."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from optimizer_cases import (
    AFTER,
    BEFORE,
    CASES,
    CODED,
    RANK,
    Case,
    Toy,
    change_of_B,
    each,
    rotation,
    same,
    signed_permutation,
    tensors,
)
from torch import Tensor, nn

from lora_squeeze.training.optimizer_state import Change, carried_state, exchange, full, like

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


@each(name for name, case in CASES.items() if case.first and name not in CODED)
def test_first_moments_are_those_of_the_rotated_problem(case: Case) -> None:
    """The rotated problem is trained with lr 0 along the same path: its averages are made of its own gradients."""
    P, R = rotation()
    toy, rotated = Toy.of(case), Toy.of(case, lr=0.0)
    for number in range(BEFORE):
        for parameter, value in zip((rotated.B, rotated.A), toy.values(P, R), strict=True):
            parameter.data.copy_(value)
        rotated.train(number, 1)
        toy.train(number, 1)
    states = toy.states(P, R)
    for old, new in ((toy.B, rotated.B), (toy.A, rotated.A)):
        for key in case.first:
            expected = rotated.optimizer.state[new][key]
            error = float((states[old][key] - expected).norm() / expected.norm())
            assert error < 100 * torch.finfo(case.dtype).eps, f"{key}: {error}"


@each()
def test_after_a_signed_permutation_the_whole_trajectory_is_the_same(case: Case) -> None:
    """Second moments are exact too: no coordinates are mixed."""
    P, R = signed_permutation()
    toy, moved = Toy.of(case).train(0, BEFORE), Toy.of(case).train(0, BEFORE)
    moved.squeeze(P, R)
    start = toy.values(P, R)
    expected = toy.train(BEFORE, AFTER).values(P, R)
    moved.train(BEFORE, AFTER)
    for found, end, begin in zip((moved.B, moved.A), expected, start, strict=True):
        error = float((found.detach() - end).norm() / (end - begin).norm())
        assert error < case.tolerance, error


@each()
def test_a_lower_rank_gives_states_of_its_shapes_and_training_goes_on(case: Case) -> None:
    k = 2
    toy, whole = Toy.of(case).train(0, BEFORE), Toy.of(case).train(0, BEFORE)
    reference = [set(whole.optimizer.state.get(p, {})) for p in (whole.B, whole.A)]
    toy.squeeze(*rotation(k))
    fresh = Toy(toy.B, toy.A, case.make([nn.Parameter(toy.B.detach().clone()), nn.Parameter(toy.A.detach().clone())]))
    fresh.B, fresh.A = fresh.optimizer.param_groups[0]["params"]
    fresh.train(0, 1)
    for (old, new), keys in zip(((fresh.B, toy.B), (fresh.A, toy.A)), reference, strict=True):
        expected, found = (t.optimizer.state.get(p, {}) for t, p in ((fresh, old), (toy, new)))
        assert set(found) == keys
        assert {key: (t.shape, t.dtype) for key, t in tensors(found).items()} == {
            key: (t.shape, t.dtype) for key, t in tensors(expected).items()
        }
    before = toy.B.detach().clone(), toy.A.detach().clone()
    toy.train(BEFORE, AFTER)
    for parameter, value in zip((toy.B, toy.A), before, strict=True):
        assert parameter.isfinite().all() and not torch.equal(parameter, value)


def test_second_moments_go_by_the_squared_coefficients() -> None:
    P, R = rotation(2)
    toy = Toy.of(CASES["Adam, amsgrad"]).train(0, BEFORE)
    old = {p: toy.optimizer.state[p] for p in (toy.B, toy.A)}
    states = toy.states(P, R)
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert torch.allclose(states[toy.B][key], old[toy.B][key] @ R.T.square(), rtol=1e-12)
        assert torch.allclose(states[toy.A][key], P.T.square() @ old[toy.A][key], rtol=1e-12)
    assert float(states[toy.B]["step"]) == BEFORE


@each(["Adafactor of torch", "Adafactor"])
def test_factored_moments_are_the_means_of_the_mapped_matrix(case: Case) -> None:
    P, R = rotation(2)
    toy = Toy.of(case).train(0, BEFORE)
    state, new = toy.optimizer.state[toy.B], toy.states(P, R)[toy.B]
    row, column = ("row_var", "col_var") if "row_var" in state else ("exp_avg_sq_row", "exp_avg_sq_col")
    V = torch.outer(state[row].flatten(), state[column].flatten()) / state[row].mean() @ R.T.square()
    assert torch.allclose(new[row].flatten(), V.mean(1), rtol=1e-12)
    assert torch.allclose(new[column].flatten(), V.mean(0), rtol=1e-12)
    if "RMS" in state:
        B = toy.values(P, R)[0]
        assert float(new["RMS"]) == pytest.approx(float(B.square().mean().sqrt()))


@pytest.mark.parametrize(
    ("name", "key", "factor"),
    [("AdamW", "exp_avg", 0.5), ("AdamW", "exp_avg_sq", 0.25), ("Adafactor, momentum", "exp_avg", 2.0)],
)
def test_gradients_go_against_the_parameter_and_steps_with_it(name: str, key: str, factor: float) -> None:
    """With B' = 2 B and A' = A / 2 the gradient of B' is half as large; Adafactor's momentum is made of steps."""
    double = 2 * torch.eye(RANK, dtype=torch.float64)
    toy = Toy.of(CASES[name]).train(0, BEFORE)
    assert torch.allclose(toy.states(double, double / 4)[toy.B][key], factor * toy.optimizer.state[toy.B][key])


@each(["schedule-free AdamW", "schedule-free SGD"])
def test_a_second_point_keeps_its_distance_in_the_new_coordinates(case: Case) -> None:
    """z' = B' + 2 (z - B), also where B' is not exactly 2 B."""
    double = 2 * torch.eye(RANK, dtype=torch.float64)
    toy = Toy.of(case).train(0, BEFORE)
    z, elsewhere = toy.optimizer.state[toy.B]["z"], torch.ones_like(toy.B)
    new = carried_state(toy.optimizer, toy.B, elsewhere, change_of_B(double, double / 4), "transport")["z"]
    assert torch.allclose(new, elsewhere + 2 * (z - toy.B.detach()))


@pytest.mark.parametrize("shape", [(RANK,), (RANK, 3, 2, 2)], ids=str)
@each(["Adafactor of torch", "Adafactor", "AdamW"])
def test_parameters_that_are_no_matrices_are_carried_too(case: Case, shape: tuple[int, ...]) -> None:
    """Vectors have no factored moments; a convolution's are factored in its last two dimensions."""
    P = signed_permutation()[0].T

    def by(matrix: Tensor, tensor: Tensor) -> Tensor:
        return torch.tensordot(matrix, tensor, 1)

    change = Change(lambda t: by(P, t), lambda t: by(P.square(), t), lambda t: by(P, t))
    g = torch.Generator().manual_seed(3)
    start, slopes = (torch.randn(n, *shape, generator=g, dtype=torch.float64) for n in (1, BEFORE + AFTER))

    def steps(parameter: nn.Parameter, gradients: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    old = nn.Parameter(start[0].clone())
    optimizer = case.make([old])
    steps(old, slopes[:BEFORE], optimizer)
    new = nn.Parameter(by(P, old.detach()))
    moved = case.make([old])
    moved.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    exchange(moved, {old: new}, {old: carried_state(moved, old, new, change, "transport")})
    turned = torch.stack([by(P, gradient) for gradient in slopes[BEFORE:]])
    expected = by(P, steps(old, slopes[BEFORE:], optimizer))
    assert torch.allclose(steps(new, turned, moved), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_state_keeps_its_dtype_and_is_mapped_in_float32_or_better(dtype: torch.dtype) -> None:
    toy = Toy.of(replace(CASES["AdamW"], dtype=dtype)).train(0, 2)
    seen = set()

    def by(tensor: Tensor) -> Tensor:
        seen.add(tensor.dtype)
        return tensor[:, :2]

    new = nn.Parameter(toy.B.detach()[:, :2])
    state = carried_state(toy.optimizer, toy.B, new, Change(by, by, by), "transport")
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {dtype}
    assert seen == {torch.promote_types(dtype, torch.float32)}
    assert all(t.is_contiguous() for t in tensors(state).values())


def test_squares_are_never_negative() -> None:
    """Rounding of a map may leave one a little below zero, and its root would be NaN."""
    toy = Toy.of(CASES["AdamW"]).train(0, 2)
    change = Change(lambda t: t, lambda t: t - t.median(), lambda t: t)
    state = carried_state(toy.optimizer, toy.B, toy.B, change, "transport")
    assert state["exp_avg_sq"].min() == 0 and state["exp_avg_sq"].max() > 0


@each()
def test_carrying_modifies_nothing_and_shares_no_memory(case: Case) -> None:
    toy = Toy.of(case).train(0, BEFORE)
    before = copy.deepcopy(toy.optimizer.state_dict())
    unchanged = Change(lambda t: t, lambda t: t, lambda t: t)
    state = carried_state(toy.optimizer, toy.B, toy.B, unchanged, "transport")
    memory = {t.data_ptr() for t in tensors(toy.optimizer.state.get(toy.B, {})).values()} | {toy.B.data_ptr()}
    assert not memory & {t.data_ptr() for t in tensors(state).values()}
    assert same(before, toy.optimizer.state_dict())


def test_whole_tensors_are_taken_as_they_are_and_copied_like_a_model() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert full(tensor) is tensor
    made = like(tensor.T, torch.zeros(1, dtype=torch.bfloat16))
    assert made.dtype == torch.bfloat16 and made.is_contiguous() and torch.equal(made.float(), tensor.T)
    assert like(tensor, tensor).data_ptr() != tensor.data_ptr()


# --- 8-bit state ----------------------------------------------------------------------------------------------------


def decoded(state: dict[str, Any], key: str) -> Tensor:
    """The values of a coded tensor, by the definition: code[i] times the largest of its block of 256."""
    values = state[f"qmap{key[-1]}"][state[key].long()]
    scales = state[f"absmax{key[-1]}"].repeat_interleave(256)[: values.numel()]
    return values * scales.reshape(values.shape)


@each(["bitsandbytes AdamW 8-bit", "bitsandbytes Lion 8-bit"])
def test_coded_state_is_carried_to_one_rounding_of_the_codes(case: Case) -> None:
    """1100 x 4 elements are coded; a rotation keeps them so."""
    P, R = rotation()
    toy = Toy.of(case, 1100, 1100, min_8bit_size=4096).train(0, 3)
    state, new = toy.optimizer.state[toy.B], toy.states(P, R)[toy.B]
    for key, expected in (
        ("state1", decoded(state, "state1") @ R.T.float()),
        ("state2", decoded(state, "state2") @ R.T.float().square() if "state2" in state else None),
    ):
        if expected is None:
            continue
        assert new[key].dtype == torch.uint8 and new[key].shape == (1100, RANK)
        largest = torch.stack([block.abs().max() for block in expected.flatten().split(256)])
        assert torch.allclose(new[f"absmax{key[-1]}"], largest)
        gap = new[f"qmap{key[-1]}"].sort().values.diff().max()
        error = (decoded(new, key) - expected).abs() / largest.repeat_interleave(256)[: expected.numel()].view(1100, -1)
        assert error.max() <= gap / 2 * 1.01, f"{key}: {float(error.max())} of a gap of {float(gap)}"
    toy.squeeze(P, R)
    toy.train(3, 2)
    assert toy.B.isfinite().all() and toy.optimizer.state[toy.B]["state1"].dtype == torch.uint8


@each(["bitsandbytes AdamW 8-bit", "bitsandbytes Lion 8-bit"])
def test_state_below_the_smallest_coded_size_becomes_float32(case: Case) -> None:
    """1100 x 3 elements are fewer than 4096: what the optimiser itself would start with."""
    P, R = rotation(3)
    toy = Toy.of(case, 1100, 1100, min_8bit_size=4096).train(0, 3)
    expected = decoded(toy.optimizer.state[toy.A], "state1")
    toy.squeeze(P, R)
    state = toy.optimizer.state[toy.A]
    assert set(state) == {"step", "state1", "state2"} & set(state), "no codes and no scales are left"
    assert state["state1"].dtype == torch.float32
    assert torch.allclose(state["state1"], P.T.float() @ expected, atol=1e-6 * float(expected.abs().max()))
    toy.train(3, 2)
    assert toy.A.isfinite().all() and toy.optimizer.state[toy.A]["step"] == 5


def test_codes_of_larger_blocks_are_read_with_their_own_size() -> None:
    """Old releases of bitsandbytes have one scale for 2048 codes."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    toy = Toy.of(CASES["bitsandbytes Lion 8-bit"], 1100, 1100).train(0, 2)
    state = toy.optimizer.state[toy.B]
    state["state1"], coding = quantize_blockwise(torch.randn(1100, RANK), code=state["qmap1"], blocksize=2048)
    state["absmax1"] = coding.absmax
    new = toy.states(*signed_permutation())[toy.B]
    assert new["absmax1"].shape == coding.absmax.shape
    expected = dequantize_blockwise(state["state1"], coding) @ signed_permutation()[0].float()
    found = dequantize_blockwise(new["state1"], absmax=new["absmax1"], code=new["qmap1"], blocksize=2048)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
