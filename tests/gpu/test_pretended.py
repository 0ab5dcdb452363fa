"""The pretended device itself: it refuses what a GPU refuses, and counts what it would do."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fat.utils.precision import use_full_precision
from tests.gpu.counting import memory
from tests.gpu.pretended import CUDA, PretendedGpu, PretendedTensor


class TestDevice:
    def test_tensors_say_where_they_are(self, gpu: PretendedGpu) -> None:
        for x in (
            torch.ones(3, device="cuda"),
            torch.ones(3).cuda(),
            torch.tensor([1.0, 1.0, 1.0], device="cuda:0"),
            torch.ones(3).to(device="cuda", dtype=torch.float64),
            torch.ones_like(torch.zeros(3, device="cuda")),
            torch.zeros(3, device="cuda").new_ones(3),
            torch.zeros(3, device="cuda").new_tensor([1, 1, 1]),
            torch.ones(3).type_as(torch.zeros((), device="cuda")),
        ):
            assert x.device == CUDA
            assert x.is_cuda
            assert not x.is_cpu
            assert x.tolist() == [1, 1, 1]
            assert x.cpu().device.type == "cpu"
        assert torch.zeros_like(x, device="cpu").device.type == "cpu"
        assert torch.tensor(1.0, device="cuda", requires_grad=True).is_leaf

    def test_devices_do_not_mix(self, gpu: PretendedGpu) -> None:
        x, weight = torch.ones(2, 3, device="cuda"), torch.ones(3, 3)
        with pytest.raises(RuntimeError, match=r"same device.*add was given CPU .*\(2, 3\)"):
            x[:, :1] + weight[:2]
        with pytest.raises(RuntimeError, match="same device"):
            x @ weight
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, torch.tensor([[1.0]])], 1)
        with pytest.raises(RuntimeError, match="same device"):
            weight.add_(x[0, 0])
        assert (x + torch.tensor(1.0)).device == CUDA  # a 0-dim tensor of the CPU

    def test_memory_cannot_be_read_on_the_host(self, gpu: PretendedGpu) -> None:
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            torch.ones(3, device="cuda").numpy()
        assert torch.ones(3, device="cuda").numpy(force=True).tolist() == [1, 1, 1]

    def test_a_moved_module_keeps_its_parameters(self, gpu: PretendedGpu) -> None:
        layer = nn.Linear(3, 2)
        weight, before = layer.weight, layer.weight.detach().clone()
        layer.to("cuda")
        assert layer.weight is weight
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.device == CUDA
        layer(torch.ones(1, 3, device="cuda")).sum().backward()
        assert weight.grad is not None
        assert weight.grad.device == CUDA
        twin = copy.deepcopy(layer)
        assert twin.weight.device == CUDA
        assert isinstance(twin.weight, nn.Parameter)
        layer.to("cpu")
        assert layer.weight is weight
        assert torch.equal(layer.weight, before)
        assert layer.weight.grad.device.type == "cpu"

    def test_in_place_changes_reach_views(self, gpu: PretendedGpu) -> None:
        x = torch.zeros(2, 3, device="cuda")
        x[0].add_(1)
        x.data = x.data.t().contiguous()
        assert x.tolist() == [[1, 0], [1, 0], [1, 0]]

    def test_inference_mode(self, gpu: PretendedGpu) -> None:
        x = torch.zeros(2, 3, device="cuda")
        with torch.inference_mode():
            assert x.detach().clone().to("cuda").is_inference()
            assert not x[0].is_inference()
            x[0].add_(1)
            (x + 1).relu_()
        assert x.tolist() == [[1, 1, 1], [0, 0, 0]]

    def test_saving_brings_tensors_to_the_host(self, gpu: PretendedGpu) -> None:
        file = io.BytesIO()
        torch.save({"x": torch.arange(3, device="cuda")}, file)
        file.seek(0)
        x = torch.load(file, map_location="cpu", weights_only=True)["x"]
        assert type(x) is Tensor
        assert x.tolist() == [0, 1, 2]

    def test_random_numbers_have_their_own_generator(self, gpu: PretendedGpu) -> None:
        torch.manual_seed(0)
        on_cpu = torch.rand(4)
        torch.manual_seed(0)
        drawn = torch.rand(4, device="cuda").cpu()
        assert not torch.equal(drawn, on_cpu)
        assert torch.equal(torch.rand(4), on_cpu)  # the device took nothing from the CPU's
        torch.cuda.manual_seed(0)
        assert torch.equal(torch.rand(4, device="cuda").cpu(), drawn)
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            torch.rand(4, device="cuda", generator=torch.Generator())
        generator = torch.Generator("cuda")
        assert isinstance(generator, torch.Generator)
        assert torch.ones(4, device="cuda").uniform_(generator=generator).device == CUDA
        with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
            torch.rand(4, generator=generator)

    def test_nothing_is_left_behind(self) -> None:
        names = ("is_available", "current_device", "synchronize", "Event", "get_rng_state_all")
        before = [getattr(torch.cuda, name) for name in names]
        generator, pin = torch.Generator, Tensor.pin_memory

        def failing() -> None:
            with PretendedGpu():
                kept.append(torch.ones(3, device="cuda"))
                use_full_precision()
                raise ZeroDivisionError

        kept: list[Tensor] = []
        with pytest.raises(ZeroDivisionError):
            failing()
        assert [getattr(torch.cuda, name) for name in names] == before
        assert (torch.Generator, Tensor.pin_memory) == (generator, pin)
        assert not torch.__future__.get_swap_module_params_on_conversion()
        assert type(torch.ones(3) + 1) is Tensor
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        with pytest.raises(RuntimeError, match="after its with block"):
            kept[0] + 1


class TestAutocast:
    def test_products_are_cast_down_and_losses_up(self, gpu: PretendedGpu) -> None:
        layer = nn.Conv2d(3, 4, 3).to("cuda")
        x = torch.ones(1, 3, 8, 8, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            assert F.relu6(y).dtype == torch.bfloat16
            loss = F.mse_loss(y, torch.zeros_like(y))
            assert loss.dtype == torch.float32
            with torch.autocast("cuda", enabled=False):
                assert layer(x).dtype == torch.float32
        loss.backward()
        assert layer.weight.grad.dtype == torch.float32

    def test_the_values_are_those_of_half_precision(self, gpu: PretendedGpu) -> None:
        a, b = torch.rand(4, 8), torch.rand(8, 3)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            product = a.to("cuda") @ b.to("cuda")
            assert (a @ b).dtype == torch.float32  # autocast of CUDA leaves the CPU alone
        # Products of rounded values, summed up in float32 and rounded once.
        assert torch.equal(product.cpu(), (a.bfloat16().float() @ b.bfloat16().float()).bfloat16())

    def test_float64_is_left(self, gpu: PretendedGpu) -> None:
        x = torch.ones(2, 2, device="cuda", dtype=torch.float64)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert (x @ x).dtype == torch.float64


class TestArithmetic:
    def test_a_division_by_a_number_is_a_product_with_its_reciprocal(self) -> None:
        x = torch.arange(1, 1000).float()
        by_cpu = x / 255
        with PretendedGpu() as gpu:
            assert torch.equal((x.to("cuda") / 255).cpu(), by_cpu)
            assert not gpu.reciprocal
        with PretendedGpu(reciprocal=True):
            on_device = x.to("cuda")
            wanted = x * torch.reciprocal(torch.tensor(255.0))
            assert not torch.equal(wanted, by_cpu)
            assert torch.equal((on_device / 255).cpu(), wanted)
            assert torch.equal((on_device / torch.tensor(255.0)).cpu(), wanted)
            assert torch.equal((on_device / torch.tensor(255.0, device="cuda")).cpu(), by_cpu)
            assert torch.equal((on_device.double() / 255).float().cpu(), by_cpu)
            assert torch.equal(on_device.clone().div_(255).cpu(), wanted)

    def test_tf32_rounds_the_inputs_of_convolutions(self) -> None:
        x, weight = torch.full((1, 1, 1, 1), 1 + 2.0**-11), torch.full((1, 1, 1, 1), 1.0)
        with PretendedGpu(tf32=True):
            ours = x.to("cuda"), weight.to("cuda")
            assert F.conv2d(*ours).item() == 1 + 2.0**-10
            assert F.conv2d(ours[0].double(), ours[1].double()).item() == 1 + 2.0**-11
            conv = torch.backends.cudnn.conv
            before = conv.fp32_precision
            try:
                conv.fp32_precision = "ieee"
                assert F.conv2d(*ours).item() == 1 + 2.0**-11
            finally:
                conv.fp32_precision = before
            # Matrix products use TF32 only if it is asked for.
            assert (ours[0].flatten(1) @ ours[1].flatten(1)).item() == 1 + 2.0**-11

    def test_a_fused_step_of_adam_is_that_of_the_cpu(self, gpu: PretendedGpu) -> None:
        def trained(device: str) -> Tensor:
            torch.manual_seed(0)
            layer, x = nn.Linear(8, 4), torch.rand(4, 8)
            layer, x = layer.to(device), x.to(device)
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=device == "cuda")
            for _ in range(4):
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                optimizer.step()
            return layer.weight.detach().cpu()

        assert torch.equal(trained("cuda"), trained("cpu"))


class TestCounts:
    def test_memory_of_expanded_tensors(self) -> None:
        assert memory(torch.zeros(3, 4)) == 48
        assert memory(torch.zeros(()).expand(1024)) == 4
        assert memory(torch.zeros(3, 1).expand(3, 5)) == 12
        assert memory(torch.zeros(0, 5)) == 0

    def test_kernels_and_their_bytes(self, gpu: PretendedGpu) -> None:
        x = torch.ones(4, 4, device="cuda")
        with gpu.counting() as counts:
            y = x.view(16)[:8]  # views
            y = y * 2  # reads 32, writes 32
            y.add_(y)  # reads 32 once, writes 32
            z = torch.empty(8, device="cuda")  # allocates
            z.copy_(y)  # reads 32, writes 32
            z.fill_(1)  # writes 32
        assert counts.launched == 4
        assert counts.read == {"mul": 32, "add_": 32, "copy_": 32, "fill_": 0}
        assert counts.written == {"mul": 32, "add_": 32, "copy_": 32, "fill_": 32}
        assert counts.host_reads == 0
        assert not counts.copies

    def test_a_backward_pass_is_counted_by_operation(self, gpu: PretendedGpu) -> None:
        layer, x = nn.Conv2d(1, 1, 1).to("cuda"), torch.ones(2, 1, 4, 4, device="cuda")
        y = layer(x)
        with gpu.counting() as counts:
            y.backward(torch.ones_like(y))
        by_line = {line: n for (name, line), n in counts.kernels.items() if "conv" in name}
        assert by_line == {"backward of ConvolutionBackward0": 1}
        # ones_like, the convolution's backward; the gradients are kept without a kernel
        assert counts.launched == 2

    def test_lists_are_split_as_on_a_device(self, gpu: PretendedGpu) -> None:
        many = [torch.ones(3, device="cuda") for _ in range(120)]
        with gpu.counting() as counts:
            torch._foreach_mul_(many, 2.0)  # one list: 110 tensors a launch
            torch._foreach_add_(many, many)  # two lists: 64 tensors a launch
        assert counts.of("_foreach_mul_") == 2
        assert counts.of("_foreach_add_") == 2
        large = [torch.ones(65_536, device="cuda").expand(400, -1)]
        with gpu.counting() as counts:
            torch._foreach_mul(large, 2.0)  # 400 blocks, 320 a launch
        assert counts.of("_foreach_mul") == 2

    def test_host_reads(self, gpu: PretendedGpu) -> None:
        x = torch.arange(4.0, device="cuda")
        mask, cpu = x > 1, torch.zeros(4)
        with gpu.counting() as counts:
            x[0].item()
            float(x[1])
            bool(mask[0])
            x.tolist()
            x.cpu()
            mask.nonzero()
            x[mask]
            torch.bincount(x.long())
            torch.equal(x, x)
            cpu.copy_(x)
            torch.cuda.synchronize()
        assert counts.host_reads == 11
        kinds = {kind for kind, _ in counts.reads}
        shown = {"item", "copy to the host", "nonzero", "index", "bincount", "equal", "synchronize"}
        assert kinds == shown

    def test_copies_that_wait(self, gpu: PretendedGpu) -> None:
        x = torch.ones(4).pin_memory()
        assert x.is_pinned()
        assert x[:2].is_pinned()
        assert not torch.ones(4).is_pinned()
        with gpu.counting() as counts:
            x.to("cuda", non_blocking=True)
            torch.zeros(4, device="cuda").copy_(x, non_blocking=True)
        assert counts.copies.total() == 2
        assert not counts.waiting_copies
        with gpu.counting() as counts:
            x.to("cuda")
            torch.tensor(3.0, device="cuda")
            torch.zeros(4, device="cuda")[torch.tensor([1, 2])]
        assert counts.waiting_copies.total() == 3

    def test_a_copy_without_waiting_arrives_with_an_event(self, gpu: PretendedGpu) -> None:
        host = torch.zeros(2, pin_memory=True)
        with gpu.counting() as counts:
            host.copy_(torch.ones(2, device="cuda"), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            assert host.tolist() == [0, 0]
            assert not event.query()
            event.synchronize()
        assert host.tolist() == [1, 1]
        assert event.query()
        assert counts.host_reads == 0
        host.zero_()
        pageable = torch.zeros(2)
        with gpu.counting() as counts:  # a copy to pageable memory waits in any case
            pageable.copy_(torch.ones(2, device="cuda"), non_blocking=True)
        assert pageable.tolist() == [1, 1]
        assert counts.host_reads == 1

    def test_custom_operators_are_one_kernel(self, gpu: PretendedGpu) -> None:
        from fat.quant.functional import fake_quantize

        x = torch.linspace(-1, 1, 64, device="cuda").requires_grad_()
        scale = torch.tensor(0.01, device="cuda")
        zero_point = torch.tensor(0.0, device="cuda")
        fake_quantize(x, scale, zero_point, -127, 127).sum().backward()
        with gpu.counting() as counts:
            y = fake_quantize(x, scale, zero_point, -127, 127)
        assert counts.of("fat::") == 1
        assert counts.launched == 1
        # 64 floats and twice one float in, 64 floats and 64 codes out
        assert counts.bytes == 4 * 64 + 2 * 4 + 4 * 64 + 64
        with gpu.counting() as counts:
            y.backward(torch.ones_like(y))
        assert counts.of("fat::") == 1

    def test_watchers_see_every_operation(self, gpu: PretendedGpu) -> None:
        seen = []
        gpu.watchers.append(lambda func, args, kwargs: seen.append((str(func), args)))
        x = torch.ones(2, device="cuda")
        seen.clear()
        x / 3
        ((name, args),) = seen
        assert name == "aten.div.Tensor"
        assert args[0] is x
        assert args[1] == 3


class TestLibraries:
    def test_loader_pins_batches(self, gpu: PretendedGpu) -> None:
        data = TensorDataset(torch.ones(8, 3), torch.arange(8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batches = list(DataLoader(data, batch_size=4, pin_memory=True))
        assert all(x.is_pinned() for batch in batches for x in batch)

    def test_optimizers_take_lists_by_themselves(self, gpu: PretendedGpu) -> None:
        layer = nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.ones(1, 3, device="cuda")).sum().backward()
        with gpu.counting() as counts:
            optimizer.step()
        assert counts.launched == counts.of("_foreach_") == 1
        assert counts.host_reads == 0

    def test_gradients_are_clipped_without_a_host_read(self, gpu: PretendedGpu) -> None:
        layer = nn.Linear(3, 2).to("cuda")
        layer(torch.ones(1, 3, device="cuda")).square().sum().backward()
        with gpu.counting() as counts:
            norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
        assert norm.device == CUDA
        assert counts.host_reads == 0
        assert counts.of("_foreach_norm") == counts.of("_foreach_mul_") == 1

    def test_subclass_survives_clone_and_detach(self, gpu: PretendedGpu) -> None:
        x = torch.ones(3, device="cuda", requires_grad=True)
        assert x.requires_grad
        assert isinstance(x.detach().clone(), PretendedTensor)
