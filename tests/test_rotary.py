"""Rotary embedding in torch: every position of its tables turns, and those beyond are named by NaN."""

import pytest
import torch

from flash.kernels.spec import Rotary
from flash.rotary import turned


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_position_of_the_tables_turns_and_those_beyond_are_nan(interleaved: bool) -> None:
    angles = torch.rand(5, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    positions = torch.tensor([[-2, -1, 0, 1, 4, 5, 6], [4, 3, 2, 1, 0, 0, 9]])
    y = turned(x, positions, Rotary(angles.cos(), angles.sin(), interleaved))
    a, b = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
    phase = torch.polar(torch.ones(5, 3, dtype=torch.float64), angles)[positions.clamp(0, 4)][:, None]
    want = torch.complex(a, b) * phase
    got = torch.complex(*((y[..., 0:6:2], y[..., 1:6:2]) if interleaved else (y[..., :3], y[..., 3:6])))
    beyond = (positions > 4)[:, None, :, None].expand_as(got)
    assert got[beyond].isnan().all()
    torch.testing.assert_close(got[~beyond], want[~beyond])
    assert torch.equal(y[..., 6:], x[..., 6:])
