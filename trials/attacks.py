"""TorchScript modules with operations that no network has: scripted once, with stand-ins for the paths of a try."""

from pathlib import Path
from typing import Tuple  # noqa: UP035  (TorchScript's compiler wants it)

import torch
from torch import nn


class _Base(nn.Module):
    marker: str

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.marker = "@MARKER@"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean(dim=[2, 3]))


class _Saving(_Base):
    @torch.jit.export
    def __getstate__(self) -> Tuple[bool, torch.Tensor, str]:  # noqa: UP006
        return (self.training, self.fc.weight, self.marker)

    @torch.jit.export
    def __setstate__(self, state: Tuple[bool, torch.Tensor, str]) -> None:  # noqa: UP006
        torch.save(state[1], state[2])
        self.training = state[0]


class _Reading(_Base):
    @torch.jit.export
    def __getstate__(self) -> Tuple[bool, torch.Tensor, str]:  # noqa: UP006
        return (self.training, self.fc.weight, self.marker)

    @torch.jit.export
    def __setstate__(self, state: Tuple[bool, torch.Tensor, str]) -> None:  # noqa: UP006
        self.training = torch.from_file("@SECRET@", False, 16).sum().item() > 0


class _Waiting(_Base):
    @torch.jit.export
    def __getstate__(self) -> Tuple[bool, torch.Tensor, str]:  # noqa: UP006
        return (self.training, self.fc.weight, self.marker)

    @torch.jit.export
    def __setstate__(self, state: Tuple[bool, torch.Tensor, str]) -> None:  # noqa: UP006
        while True:
            pass


class _Growing(_Base):
    @torch.jit.export
    def __getstate__(self) -> Tuple[bool, torch.Tensor, str]:  # noqa: UP006
        return (self.training, self.fc.weight, self.marker)

    @torch.jit.export
    def __setstate__(self, state: Tuple[bool, torch.Tensor, str]) -> None:  # noqa: UP006
        self.training = torch.ones([3000000000]).sum().item() > 0


class _SavingInForward(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.marker)
        return self.fc(self.conv(x).relu().mean(dim=[2, 3]))


class _ReadingInForward(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.from_file("@SECRET@", False, 16)
        return self.fc(self.conv(x).relu().mean(dim=[2, 3])) + y.sum()


class _WaitingInForward(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.sum() < 1e30:
            x = x * 1.0
        return self.fc(self.conv(x).relu().mean(dim=[2, 3]))


class _CountingInForward(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = 0
        for i in range(1000000000000):
            total += i
        return self.fc(self.conv(x).relu().mean(dim=[2, 3])) + total


class _GrowingInForward(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean(dim=[2, 3])) + torch.ones([3000000000]).sum()


class _SavingInFunction(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(_helper(self.conv(x), self.marker).mean(dim=[2, 3]))


def _helper(x: torch.Tensor, path: str) -> torch.Tensor:
    torch.save(x, path)
    return x.relu()


class _SavingInBranch(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 0:
            torch.save(x, self.marker)
        return self.fc(self.conv(x).relu().mean(dim=[2, 3]))


class _Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class _Printing(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("\x1b[31mprinted")
        return self.fc(self.conv(x).relu().mean(dim=[2, 3]))


class _Raising(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 0:
            raise RuntimeError("\x1b[31m\u202eraised")
        return self.fc(self.conv(x).relu().mean(dim=[2, 3]))


class _SavingInExported(_Base):
    @torch.jit.export
    def other(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.marker)
        return x


_ATTACKS = (
    *(
        _Saving,
        _Reading,
        _Waiting,
        _Growing,
        _SavingInForward,
        _ReadingInForward,
        _WaitingInForward,
        _CountingInForward,
    ),
    *(_GrowingInForward, _SavingInFunction, _SavingInBranch, _Printing, _Raising, _SavingInExported),
)


def write(folder: Path) -> None:
    """Script each, alone and inside another module."""
    for attack in _ATTACKS:
        name = attack.__name__.strip("_").lower()
        torch.jit.save(torch.jit.script(attack()), folder / f"attack-{name}.pt")
        torch.jit.save(torch.jit.script(_Outer(attack())), folder / f"attack-{name}-inside.pt")
