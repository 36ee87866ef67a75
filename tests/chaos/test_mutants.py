"""The deliberate bugs still fit the tree; `make chaos-mutants` tells whether they are found."""

import subprocess
from pathlib import Path

import pytest

from chaos.mutation import MUTANTS, PATCHES, Mutant, apply
from devstack.state import REPOSITORY


def test_each_patch_has_its_mutant() -> None:
    assert len(MUTANTS) == 10
    assert {patch.stem for patch in PATCHES.glob("*")} == {mutant.name for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_patch_applies_to_the_tree_as_it_is(mutant: Mutant, tmp_path: Path) -> None:
    names = [
        line.removeprefix("--- a/")
        for line in mutant.patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("--- a/")
    ]
    assert names
    for name in names:
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((REPOSITORY / name).read_bytes())
    apply(mutant.patch, tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() != (REPOSITORY / name).read_bytes()


def test_a_patch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chaos").mkdir()
    (tmp_path / "chaos" / "clients.py").write_text("nothing of it\n")
    with pytest.raises(subprocess.CalledProcessError):
        apply(PATCHES / "retry-without-its-key.patch", tmp_path)
