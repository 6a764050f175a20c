"""A CUDA device that is not there: torch's FakeTensorMode says what a GPU would refuse, and the CPU computes the
numbers.

FakeTensorMode knows the rules of devices, shapes and types, autocast on CUDA among them, but no numbers:
whatever looks at one ends there.
Here each pretended tensor also holds its numbers on the CPU, so that matching, sampling, metrics run as well;
backward passes need a driver.
"""
import contextlib
import warnings
from unittest import mock
import torch
import torch.nn.attention
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode)
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device('cuda:0')
_NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)

def values_of(x):
    "The numbers of a tensor, on the CPU, whichever device it pretends to be on."
    return x.value if isinstance(x, FakeTensor) else x

def _on_cpu(x):
    "An argument as the CPU takes it."
    return torch.device('cpu') if isinstance(x, torch.device) else values_of(x)

class PretendedCuda(FakeTensorMode):
    "Inside the block tensors may be on the device 'cuda'; a mix of devices is an error, as it is on a GPU."
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.seen = 0
        self.asking = False # operations on the pretended device; is a rule being asked, which asks others?

    avoid_device_init = True # whatever `torch.cuda.is_available` says

    def pretend(self, value, device=CUDA):
        "A tensor that says it is on a device, with the numbers of one on the CPU."
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='meta')
        fake = FakeTensor(self, like, device)
        fake.value = value.detach()
        return fake

    def dispatch(self, func, types, args=(), kwargs=None):
        "Ask the rules first, then compute."
        kwargs = kwargs or {}
        if self.asking or func.namespace == 'prim': return super().dispatch(func, types, args, kwargs)
        flat,_ = tree_flatten((args, kwargs))
        named = [x for x in flat if isinstance(x, torch.device) and x.type == 'cuda']
        if not named and not any(isinstance(x, FakeTensor) for x in flat): return func(*args, **kwargs)
        self.seen += 1
        _check_generator(func, flat, named)
        found = self._by_rules(func, types, args, kwargs)
        with torch.no_grad(): real = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        return self._joined(found, real, flat)

    def _by_rules(self, func, types, args, kwargs):
        "What FakeTensorMode makes of the arguments; the device alone where it would have to know numbers."
        def rule(x): return self.pretend(x, x.device) if type(x) in (torch.Tensor, torch.nn.Parameter) else x
        args,kwargs = tree_map(rule, args),tree_map(rule, kwargs)
        self.asking = True
        try: return super().dispatch(func, types, args, kwargs)
        except _NEEDS_NUMBERS: return FakeTensor._find_common_device(func, tree_flatten((args, kwargs))[0])[0]
        finally: self.asking = False

    def _joined(self, found, real, flat):
        "Numbers in what pretends: tensors on the CPU are plain ones, as they can be read there."
        mine = {id(x.value): x for x in flat if isinstance(x, FakeTensor)}
        devices = [x.device for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)] or [found]
        outs,_ = tree_flatten(real)
        told = iter(devices if len(devices) == sum(isinstance(x, torch.Tensor) for x in outs)
                    else devices[:1]*len(outs))
        fakes = iter([x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)])
        def join(x):
            if not isinstance(x, torch.Tensor): return x
            device,fake = next(told),next(fakes, None)
            # statistics that only a backward pass reads are empty on the CPU
            if fake is not None and x.numel(): _check_alike(fake, x)
            if id(x) in mine: return mine[id(x)]
            return self.pretend(x, device) if device.type == 'cuda' else x
        return tree_map(join, real)

def _check_generator(func, flat, named):
    "A generator draws on its own device only."
    if any(isinstance(x, torch.Generator) and x.device.type == 'cpu' for x in flat):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")

def _check_alike(fake, real):
    "The rules and the numbers must agree."
    if fake.shape == real.shape and fake.dtype == real.dtype: return
    raise AssertionError(
        f'{tuple(fake.shape)} {fake.dtype} by the rules of CUDA, {tuple(real.shape)} {real.dtype} on the CPU')

@contextlib.contextmanager
def pretended_cuda():
    "A block in which torch has a CUDA device, as far as opentrans asks."
    nothing = torch.zeros(16, dtype=torch.uint8)
    answers = dict(is_available=lambda: True, device_count=lambda: 1, is_bf16_supported=lambda *a, **k: True,
                   get_rng_state=lambda *a: nothing, set_rng_state=lambda *a: None,
                   get_rng_state_all=lambda: [nothing], set_rng_state_all=lambda states: None,
                   manual_seed_all=lambda seed: None, synchronize=lambda *a: None, is_initialized=lambda: False,
                   is_current_stream_capturing=lambda: False)
    with contextlib.ExitStack() as stack:
        for name,answer in answers.items(): stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # which asks the driver
        stack.enter_context(mock.patch('torch._subclasses.fake_tensor.init_gpu_context', lambda *device: None))
        stack.enter_context(mock.patch('torch.cuda.amp.common.amp_definitely_not_available', lambda: False))
        # opentrans asks: it holds no numbers
        stack.enter_context(mock.patch.object(torch._subclasses, 'FakeTensor', type('Other', (), {})))
        # else backward asks a queue of the device
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False)) # the CPU has no kernels of cuDNN,
        # nor of fused attention
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(warnings.catch_warnings())
        yield stack.enter_context(PretendedCuda())
