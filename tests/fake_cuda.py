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

CUDA = torch.device('cuda:0')
_DEVICE = torch.ops.prim.device.default
_NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)

def values_of(x):
    "The numbers of a tensor, on the CPU, whichever device it pretends to be on."
    return x.value if isinstance(x, FakeTensor) else x

def _device_of(x): return x.fake_device if isinstance(x, FakeTensor) else x.device

def _is_cuda(x): return isinstance(x, torch.device) and x.type == 'cuda'

def _each(work, x):
    "Arguments or results, with something done to each."
    if isinstance(x, (list, tuple)): return type(x)([_each(work, y) for y in x])
    if isinstance(x, dict): return {k: _each(work, y) for k,y in x.items()}
    return work(x)

def _leaves(x):
    "Arguments or results, one after another."
    for y in x:
        if isinstance(y, (list, tuple)): yield from _leaves(y)
        else: yield y

def _told(x):
    "What the rules look at."
    if isinstance(x, (list, tuple)): return tuple(map(_told, x))
    if isinstance(x, torch.Tensor): return _device_of(x), x.dtype, x.shape
    return type(x), x

def _on_cpu(x):
    "An argument as the CPU takes it."
    return torch.device('cpu') if isinstance(x, torch.device) else values_of(x)

class PretendedCuda(FakeTensorMode):
    "Inside the block tensors may be on the device 'cuda'; a mix of devices is an error, as it is on a GPU."
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False # `answers` is simpler, and holds what torch does not keep
        self.seen = 0
        self.asking = False # operations on the pretended device; is a rule being asked, which asks others?

    avoid_device_init = True # whatever `torch.cuda.is_available` says
    answers = {} # of the rules

    def pretend(self, value, device=CUDA):
        "A tensor that says it is on a device, with the numbers of one on the CPU."
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='meta')
        fake = FakeTensor(self, like, device)
        fake.value = value.detach()
        return fake

    @classmethod
    def _should_skip_dynamo(cls): return False # there is none, and the way around it is long

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0].fake_device if func is _DEVICE else self.dispatch(func, types, args, kwargs)

    def dispatch(self, func, types, args=(), kwargs=None):
        "Ask the rules first, then compute."
        kwargs = kwargs or {}
        if self.asking or func.namespace == 'prim': return super().dispatch(func, types, args, kwargs)
        given = (*args, *kwargs.values())
        if FakeTensor not in types and not any(map(_is_cuda, given)): return func(*args, **kwargs)
        self.seen += 1
        flat = [*_leaves(given)]
        _check_generator(func, flat)
        found = self._by_rules(func, types, args, kwargs)
        with torch.no_grad(): real = func(*_each(_on_cpu, args), **_each(_on_cpu, kwargs))
        return self._joined(found, real, flat)

    def _by_rules(self, func, types, args, kwargs):
        """What FakeTensorMode makes of the arguments: of each tensor the device, and shape and type where it needs
        no numbers for them. The same question has the same answer, unless it changes its arguments; a refusal is an
        error, and never remembered. A view is where its tensor is."""
        if torch.Tag.inplace_view in func.tags or any(a.is_out for a in func._schema.arguments):
            return self._asked(func, types, args, kwargs)
        if func.is_view and type(args[0]) is FakeTensor: return [(args[0].fake_device, None)]
        question = (func, torch.get_default_dtype(), _told(args), *((k, _told(x)) for k,x in kwargs.items()))
        if question not in self.answers: self.answers[question] = self._asked(func, types, args, kwargs)
        return self.answers[question]

    def _asked(self, func, types, args, kwargs):
        def rule(x): return self.pretend(x, x.device) if type(x) in (torch.Tensor, torch.nn.Parameter) else x
        args,kwargs = _each(rule, args),_each(rule, kwargs)
        self.asking = True
        try: found = super().dispatch(func, types, args, kwargs)
        except _NEEDS_NUMBERS:
            return [(FakeTensor._find_common_device(func, [*_leaves((*args, *kwargs.values()))])[0], None)]
        finally: self.asking = False
        return [(_device_of(x), (x.shape, x.dtype)) for x in _leaves([found]) if isinstance(x, torch.Tensor)]

    def _joined(self, found, real, flat):
        "Numbers in what pretends: tensors on the CPU are plain ones, as they can be read there."
        mine = {id(x.value): x for x in flat if isinstance(x, FakeTensor)}
        if not found: return real
        count = sum(isinstance(x, torch.Tensor) for x in _leaves([real]))
        devices = iter([device for device,_ in found] if len(found) == count else [found[0][0]]*count)
        rules = iter([rule for _,rule in found])
        def join(x):
            if not isinstance(x, torch.Tensor): return x
            device,rule = next(devices),next(rules, None)
            # statistics that only a backward pass reads are empty on the CPU
            if rule is not None and x.numel(): _check_alike(rule, x)
            if id(x) in mine: return mine[id(x)]
            return self.pretend(x, device) if device.type == 'cuda' else x
        return _each(join, real)

def _check_generator(func, flat):
    "A generator draws on its own device only."
    if any(isinstance(x, torch.Generator) and x.device.type == 'cpu' for x in flat):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")

def _check_alike(rule, real):
    "The rules and the numbers must agree."
    shape,dtype = rule
    if shape == real.shape and dtype == real.dtype: return
    raise AssertionError(
        f'{tuple(shape)} {dtype} by the rules of CUDA, {tuple(real.shape)} {real.dtype} on the CPU')

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
