"The stand-in itself: it refuses what CUDA refuses, takes what it takes, and counts."

import copy
import io

import pytest
import standin
import torch

DEVICE = "standin"


def ones(*shape, **options):
    return torch.ones(*shape, device=DEVICE, **options)


def index():
    return torch.tensor([0])


REFUSED = {
    "add": lambda a, b: a + b,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a[0], b[0]]),
    "matmul": lambda a, b: a @ b,
    "linear": lambda a, b: torch.nn.functional.linear(a[None], b[None]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "lerp": lambda a, b: a.lerp(a, b),
    "isin": torch.isin,
    "gather": lambda a, b: a.gather(0, index()),
    "index of the device": lambda a, b: b[index().to(DEVICE)],
    "index_copy": lambda a, b: a.index_copy(0, index(), a[:1]),
    "index_put": lambda a, b: a.index_put((index().to(DEVICE),), b[:1]),
    "scatter_reduce": lambda a, b: a.scatter_reduce(0, index(), a, "amin"),
    "embedding": lambda a, b: torch.embedding(a[:, None], index()),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 0.0),
    "masked_scatter": lambda a, b: a.masked_scatter(b > 0, a),
    "numpy": lambda a, b: a.numpy(),
    "a generator of the CPU": lambda a, b: torch.multinomial(
        a, 1, generator=torch.Generator()
    ),
    "a generator of the device": lambda a, b: torch.rand(
        3, generator=torch.Generator(DEVICE)
    ),
    "attention": lambda a, b: torch.nn.functional.scaled_dot_product_attention(
        *[a.expand(1, 1, 3, 3)] * 2, b.expand(1, 1, 3, 3)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](ones(3), torch.ones(3))


def test_what_it_takes():
    a = torch.arange(4.0, device=DEVICE)
    assert (a + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]  # a scalar of the CPU
    assert a[torch.tensor([1])].tolist() == [1] and a[[1, 2]].tolist() == [1, 2]
    assert a[a > 1].tolist() == [2, 3]
    a[torch.tensor([0])] = 5.0
    a[:2] = torch.tensor([a[0].item() + 2, 8.0])
    assert a.cpu().tolist() == [7, 8, 2, 3]


def test_views_share_memory():
    a = torch.arange(4.0, device=DEVICE)
    view = a.view(2, 2)
    view += 1
    assert a.tolist() == [1, 2, 3, 4]
    assert view.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


def test_gradients_copies_and_files():
    x = ones(2, requires_grad=True)
    (x * 3).sum().backward()
    assert x.grad.device.type == DEVICE and x.grad.tolist() == [3, 3]
    assert copy.deepcopy(x).tolist() == [1, 1]
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.load(file, map_location="cpu").tolist() == [1, 1]


def test_random_numbers_are_those_of_the_cpu():
    ours, cpu = torch.Generator(DEVICE).manual_seed(3), torch.Generator().manual_seed(3)
    drawn = torch.rand(3, device=DEVICE, generator=ours)
    assert ours.device.type == DEVICE
    assert drawn.tolist() == torch.rand(3, generator=cpu).tolist()
    state = ours.get_state()
    drawn = torch.rand(2, device=DEVICE, generator=ours)
    ours.set_state(state)
    assert torch.rand(2, device=DEVICE, generator=ours).equal(drawn)
    torch.manual_seed(4)
    drawn = torch.randn(2, device=DEVICE)
    torch.manual_seed(4)
    assert torch.randn(2).tolist() == drawn.tolist()


COUNTED = {  # launches (None: however many) and syncs
    "add": (lambda a: a + a, 1, 0),
    "softmax": (lambda a: a.softmax(-1), 1, 0),
    "tolist": (lambda a: a.tolist(), 0, 1),
    "any": (lambda a: (a > 2).any().item(), 2, 1),
    "a[mask]": (lambda a: a[a > 0], 3, 1),
    "a[list]": (lambda a: a[[0, 1]], None, 1),
    "masked_fill": (lambda a: a.masked_fill(a > 0, 1.0), None, 0),
    "multinomial": (lambda a: torch.multinomial(a, 1), None, 0),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 0), None, 0),
    "isin": (lambda a: torch.isin(a, a[0, :1]), None, 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted(name):
    call, launches, syncs = COUNTED[name]
    a = ones(4, 4)
    standin.reset()
    call(a)
    assert standin.syncs() == syncs
    assert launches in (None, standin.launches())


def test_trace_names_the_line():
    with standin.trace(lambda frame: (frame.f_code.co_name,)) as events:
        ones(2).sum().item()
    assert events["sync", "aten::_local_scalar_dense", "test_trace_names_the_line"] == 1


def test_autocast_is_that_of_cuda():
    a = ones(4, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert a.softmax(-1).dtype == a.exp().dtype == torch.float32


def test_tied_weights_stay_tied():
    layer = torch.nn.Linear(4, 4)
    layer.tied = layer.weight
    layer.to(DEVICE)
    assert layer.tied is layer.weight and layer.weight.device.type == DEVICE


def test_memory_is_counted():
    torch.accelerator.reset_peak_memory_stats()
    already = torch.accelerator.memory_allocated()
    a = ones(2**18)
    assert torch.accelerator.memory_allocated() - already == 2**20
    del a
    assert torch.accelerator.memory_allocated() == already
    assert torch.accelerator.max_memory_allocated() >= already + 2**20
    free, total = torch.accelerator.get_memory_info()
    assert total - free == torch.accelerator.memory_allocated()
