"""Masks, side by side with torch.nn.utils.prune and Torch-Pruning, on CLIP's RN50 tower (54 layers, 23.5 M weights, random values).

    OMP_NUM_THREADS=1 python benchmarks/bench_mask.py [--steps 3] [--batch 8] [--size 224] [--device cpu] [--out result.json]

prune    drop 10 % of the remaining weights by one global threshold   | prune.global_unstructured(L1Unstructured, amount=0.1)
apply    put a given mask on a model                                  | prune.CustomFromMask, layer by layer
step     what a mask in force adds to a training step (AdamW)         | the same with torch.nn.utils.prune's reparametrisation
channel  choose channels by importance (torchvision's ResNet-50)      | Torch-Pruning's importance of every group (it then cuts, which a mask does not)

Times are medians of the process's own CPU time on the CPU (so that other work on the machine disturbs little), and of synchronised wall time on a GPU.
The overhead of a step is measured in two ways: the time spent in the mask's own hooks, and the difference of whole steps, taken in turns.
"""
import argparse, copy, json, platform, statistics, time, warnings
import torch
import torch.nn.utils.prune as tp
from torch import nn
import opentrans.pruning as P
from opentrans.pruning import SparseMask, prunable

warnings.simplefilter('ignore')

def now(device):
    if device == 'cpu': return time.process_time()
    torch.cuda.synchronize(); return time.perf_counter()

def median(f, reps, device, prepare=lambda: None):
    "Median seconds of `f(prepare())`, the first call left out."
    times = []
    for _ in range(reps+1):
        x = prepare(); t = now(device); f(x); times.append(now(device)-t)
    return statistics.median(times[1:])

def tower(device):
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    return ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64).to(device)

def pairs(model): return [(l.module, 'weight') for l in prunable(model)]

def bench_prune(model, reps, device):
    "The pruning step, at its start (all weights remain), and that both drop the same weights."
    ours = median(lambda m: m.prune(model, .1), reps, device, lambda: SparseMask.ones(model))
    late = median(lambda m: m.prune(model, .1), reps, device, lambda: SparseMask.random(model, .2))
    theirs = median(lambda m: tp.global_unstructured(pairs(m), tp.L1Unstructured, amount=.1), reps, device, lambda: copy.deepcopy(model))
    other = copy.deepcopy(model); tp.global_unstructured(pairs(other), tp.L1Unstructured, amount=.1)
    mask = SparseMask.ones(model).prune(model, .1)
    differ = sum(int((mask[l.name] != mod.weight_mask.bool().cpu()).sum()) for l,(mod,_) in zip(prunable(model), pairs(other), strict=True))
    return dict(ours_ms=ours*1e3, ours_at_density_0_2_ms=late*1e3, torch_ms=theirs*1e3, speedup=theirs/ours, weights_that_differ=differ)

def bench_apply(model, mask, reps, device):
    on_device = {n: m.to(device) for n,m in mask.items()}
    def custom(m):
        for l in prunable(m): tp.custom_from_mask(l.module, 'weight', on_device[l.name])
    ours = median(lambda m: mask.apply(m), reps, device, lambda: copy.deepcopy(model))
    theirs = median(custom, reps, device, lambda: copy.deepcopy(model))
    return dict(ours_ms=ours*1e3, torch_ms=theirs*1e3, speedup=theirs/ours)

class Stopwatch:
    "Adds up the time that a function takes."
    def __init__(self, f, device): self.f,self.device,self.total = f,device,0.
    def __call__(self, *args):
        t = now(self.device); r = self.f(*args); self.total += now(self.device)-t
        return r

def bench_step(model, mask, steps, batch, size, device):
    "A training step without a mask, with ours, and with torch.nn.utils.prune, in turns."
    x = torch.randn(batch, 3, size, size, device=device)
    net = lambda: model.__class__(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=size, width=64).to(device)
    nets = dict(dense=net(), ours=net(), torch=net())
    for l in prunable(nets['torch']): tp.custom_from_mask(l.module, 'weight', mask[l.name].to(device))
    grad,weight = (Stopwatch(f, device) for f in (P._Keeper.grad, P._Keeper.weight))
    P._Keeper.grad,P._Keeper.weight = (lambda s, p: grad(s, p)),(lambda s: weight(s))
    handle = mask.apply(nets['ours'])
    opts = {k: torch.optim.AdamW(n.parameters(), lr=1e-4) for k,n in nets.items()}
    times = {k: [] for k in nets}
    for i in range(steps+1):
        if i == 1: grad.total = weight.total = 0.
        for k,n in nets.items():
            t = now(device); opts[k].zero_grad(); n(x).square().mean().backward(); opts[k].step(); times[k].append(now(device)-t)
    P._Keeper.grad,P._Keeper.weight = grad.f,weight.f
    handle.remove()
    med = {k: statistics.median(t[1:]) for k,t in times.items()}
    hooks,dense = (grad.total+weight.total)/steps,med['dense']
    theirs = reparametrisation(nets['torch'], mask, device)
    return dict(batch=batch, size=size, dense_ms=dense*1e3, hooks_ms=hooks*1e3, hooks_share=hooks/dense, torch_reparametrisation_ms=theirs*1e3, torch_share=theirs/dense,
                ours_over_torch=hooks/theirs, whole_step_difference=med['ours']/dense-1, torch_whole_step_difference=med['torch']/dense-1)

def reparametrisation(model, mask, device, reps=3):
    "What torch.nn.utils.prune adds to a step: the product with the mask in front of each layer's forward, and its backward."
    mods = [m for m in model.modules() if hasattr(m, 'weight_mask')]
    grads = [torch.randn_like(m.weight_orig) for m in mods]
    def f(_):
        for m,g in zip(mods, grads): torch.autograd.grad(m.weight_orig*m.weight_mask.to(m.weight_orig.dtype), m.weight_orig, g)
    return median(f, reps, device)

def bench_channel(reps, device):
    try: import torch_pruning as pruning
    except ImportError: return 'torch-pruning is not installed'
    import torchvision
    net = torchvision.models.resnet50(weights=None).to(device)
    ours = median(lambda m: SparseMask.magnitude(net, .5, scope='channel', skip=('fc',)), reps, device)
    def theirs(_):
        graph = pruning.DependencyGraph().build_dependency(net, example_inputs=torch.randn(1, 3, 64, 64, device=device))
        score = pruning.importance.GroupMagnitudeImportance(p=1)
        for group in graph.get_all_groups(ignored_layers=[net.fc]): score(group)
    t = median(theirs, max(1, reps//2), device)
    return dict(ours_ms=ours*1e3, torch_pruning_ms=t*1e3, note='theirs includes the graph of dependencies between layers, which cutting channels needs and a mask does not')

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--steps', type=int, default=3); a.add_argument('--reps', type=int, default=3); a.add_argument('--batch', type=int, default=8)
    a.add_argument('--size', type=int, default=224); a.add_argument('--device', default='cpu'); a.add_argument('--out')
    args = a.parse_args()
    model = tower(args.device); mask = SparseMask.magnitude(model, .1)
    machine = torch.cuda.get_device_name() if args.device != 'cpu' else platform.processor() or platform.machine()
    result = dict(machine=machine, threads=torch.get_num_threads(), torch=torch.__version__, weights=mask.total)
    for name,f in (('prune', lambda: bench_prune(model, args.reps, args.device)), ('apply', lambda: bench_apply(model, mask, args.reps, args.device)),
                   ('step', lambda: bench_step(model, mask, args.steps, args.batch, args.size, args.device)), ('channel', lambda: bench_channel(args.reps, args.device))):
        result[name] = f(); print(name, json.dumps(result[name], indent=1, default=str), flush=True)
    if args.out:
        from opentrans.core import save_json
        save_json(result, args.out)
