"""What training moves: it is put together as the recipe says, and its state comes back whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import recipe, weights

from cifar_ft.training import Plan, Training, fit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_a_compiled_model_is_trained_and_stored_under_the_same_names(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    mine = recipe(checkpoint_steps=0, epochs=1)
    plain = fit(mine, small_data, tmp_path / "plain")
    compiled = fit(recipe(checkpoint_steps=0, epochs=1, compile=True), small_data, tmp_path / "compiled")
    assert weights(compiled.path).keys() == weights(plain.path).keys()
    np.testing.assert_allclose(compiled.logits, plain.logits, atol=1e-2)


def compile_without_a_compiler(self, compile_module=torch.nn.Module.compile):
    """The whole of torch.compile but for the C++ compiler, which a machine may lack."""
    compile_module(self, backend="aot_eager")


def test_a_step_is_measured_without_waiting_for_the_device():
    meta = torch.device("meta")  # which has shapes and no values: fetching one is an error
    training = Training(recipe(), SimpleNamespace(device=meta), Plan("fp32"), None, None, None, {}, 1)
    for _ in range(3):
        training.measure(torch.zeros(4, 10, device=meta), torch.zeros(4, dtype=torch.long, device=meta))
        training.finish_step()
    assert training.step == len(training.finished) == 3
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        training.finished[0].tolist()
