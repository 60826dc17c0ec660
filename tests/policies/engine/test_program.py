"""What a recorded graph needs of the program: nothing read by the host, everything on the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ofp_lerobot.policies.ofp.engine.graph import Inputs
from ofp_lerobot.policies.ofp.engine.operations import Plain
from ofp_lerobot.policies.ofp.engine.program import answer
from ofp_lerobot.policies.ofp.engine.weights import Weights
from ofp_lerobot.policies.ofp.network import OFPNetwork
from tests import small


@pytest.mark.parametrize("instantaneous", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_runs_on_a_device_whose_values_the_host_cannot_read(dtype, instantaneous, monkeypatch):
    """On fake CUDA tensors: reading a value, or mixing in a tensor of the host, raises."""
    monkeypatch.setattr(torch, "from_dlpack", lambda tensor: tensor)  # needs real memory
    images = ((2, 3, small.SIZE, small.SIZE), torch.float32), ((2, 24, 40, 3), torch.uint8)
    chunk = torch.Size((2, small.HORIZON, 8))
    with FakeTensorMode():
        with torch.device("cuda"):
            network = OFPNetwork(small.ofp_config(dtype=dtype))
        inputs = Inputs.empty(images, small.TEXT, chunk, 2, torch.device("cuda"))
        with torch.no_grad():
            weights = Weights(network)
            actions = answer(
                network, weights, *inputs, operations=Plain(), padding="right", instantaneous=instantaneous
            )
        assert (actions.shape, actions.device.type, actions.dtype) == (chunk, "cuda", torch.float32)
        with pytest.raises(Exception, match="ata-dependent|_local_scalar_dense"):
            actions.sum().item()
