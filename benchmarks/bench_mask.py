"""Masks, side by side with torch.nn.utils.prune and Torch-Pruning, on CLIP's RN50 tower (54 layers, 23.5 M weights,
random values).

    OMP_NUM_THREADS=1 python benchmarks/bench_mask.py [--steps 10] [--batch 8] [--size 224] [--device cpu] [--out
    result.json]

prune    drop 10 % of the remaining weights by one global threshold   | prune.global_unstructured(L1Unstructured,
amount=0.1)
apply    put a given mask on a model                                  | prune.CustomFromMask, layer by layer
step     what a mask in force adds to a training step                 | the same with torch.nn.utils.prune's
reparametrisation
channel  choose channels by importance (torchvision's ResNet-50)      | Torch-Pruning's importance of every group
(it then cuts, which a mask does not)

Times are medians of the process's own CPU time on the CPU (so that other work on the machine disturbs little),
and of synchronised wall time on a GPU.
The overhead of a step is measured in two ways: as the difference of whole steps, taken in turns, and as the time
spent in the mask's own hooks.
"""
import argparse, copy, json, platform, statistics, time, warnings
import torch
import torch.nn.utils.prune as tp
from opentrans.pruning import force as P
from opentrans.pruning import SparseMask, prunable

warnings.simplefilter('ignore')

def now(device):
    if device == 'cpu': return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()

def median(f, reps, device, prepare=lambda: None):
    "Median seconds of `f(prepare())`, the first call left out."
    times = []
    for _ in range(reps+1):
        x = prepare()
        t = now(device)
        f(x)
        times.append(now(device)-t)
    return statistics.median(times[1:])

def tower(device):
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    return ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64).to(device)

def pairs(model): return [(layer.module, 'weight') for layer in prunable(model)]

def bench_prune(model, reps, device):
    "The pruning step, at its start (all weights remain), and that both drop the same weights."
    ours = median(lambda m: m.prune(model, .1), reps, device, lambda: SparseMask.ones(model))
    late = median(lambda m: m.prune(model, .1), reps, device, lambda: SparseMask.random(model, .2))
    theirs = median(lambda m: tp.global_unstructured(pairs(m), tp.L1Unstructured, amount=.1), reps, device,
                    lambda: copy.deepcopy(model))
    other = copy.deepcopy(model)
    tp.global_unstructured(pairs(other), tp.L1Unstructured, amount=.1)
    mask = SparseMask.ones(model).prune(model, .1)
    differ = sum(int((mask[layer.name] != mod.weight_mask.bool().cpu()).sum())
                 for layer,(mod,_) in zip(prunable(model), pairs(other), strict=True))
    return dict(ours_ms=ours*1e3, ours_at_density_0_2_ms=late*1e3, torch_ms=theirs*1e3, speedup=theirs/ours,
                weights_that_differ=differ)

def bench_apply(model, mask, reps, device):
    on_device = {n: m.to(device) for n,m in mask.items()}
    def custom(m):
        for layer in prunable(m): tp.custom_from_mask(layer.module, 'weight', on_device[layer.name])
    ours = median(lambda m: mask.apply(m), reps, device, lambda: copy.deepcopy(model))
    theirs = median(custom, reps, device, lambda: copy.deepcopy(model))
    return dict(ours_ms=ours*1e3, torch_ms=theirs*1e3, speedup=theirs/ours)

class Stopwatch:
    "Adds up the time that a method takes, until it is put back."
    def __init__(self, cls, name, device):
        self.cls = cls
        self.name = name
        self.f = getattr(cls, name)
        self.total = 0.
        def timed(*args):
            t = now(device)
            r = self.f(*args)
            self.total += now(device)-t
            return r
        setattr(cls, name, timed)
    def stop(self): setattr(self.cls, self.name, self.f)

def train_step(net, opt, x):
    opt.zero_grad()
    net(x).square().mean().backward()
    opt.step()

OPTIMIZERS = dict(sgd=lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=.9, weight_decay=1e-4),
                  adamw=lambda ps: torch.optim.AdamW(ps, lr=1e-4))

def bench_step(mask, optimizer, steps, batch, size, device):
    """What a mask adds to a training step. It does not depend on the input, so it is taken on a small one, where it
    stands out, in turns with a dense model; then it is set against a dense step of full size. Denormal numbers
    are flushed. With AdamW, most of the difference is no work of the mask: torch's square root (MKL) is about
    twice as slow on exact zeros, and any mask makes the second moments zero."""
    torch.set_flush_denormal(True)
    from open_clip.modified_resnet import ModifiedResNet
    def net(s):
        return ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=s, width=64).to(device)
    nets = dict(dense=net(64), ours=net(64), torch=net(64))
    for layer in prunable(nets['torch']): tp.custom_from_mask(layer.module, 'weight', mask[layer.name].to(device))
    opts = {k: OPTIMIZERS[optimizer](n.parameters()) for k,n in nets.items()}
    x,times = torch.randn(2, 3, 64, 64, device=device),{k: [] for k in nets}
    watches = [Stopwatch(P._Keeper, n, device) for n in ('zero_grad', 'after_step')]
    with mask.apply(nets['ours']):
        for i in range(steps+2):
            if i == 2:
                for w in watches: w.total = 0.
            for k in nets:
                t = now(device)
                train_step(nets[k], opts[k], x)
                times[k].append(now(device)-t)
    for w in watches: w.stop()
    med = {k: statistics.median(t[2:]) for k,t in times.items()}
    del nets,opts
    full = net(size)
    opt = OPTIMIZERS[optimizer](full.parameters())
    y = torch.randn(batch, 3, size, size, device=device)
    dense = median(lambda _: train_step(full, opt, y), 2, device)
    ours = med['ours']-med['dense']
    theirs = med['torch']-med['dense']
    hooks = sum(w.total for w in watches)/steps
    return dict(small_step_ms={k: v*1e3 for k,v in med.items()}, ours_ms=ours*1e3, of_it_in_hooks_ms=hooks*1e3,
                torch_ms=theirs*1e3, ours_over_torch=ours/theirs,
                dense_step=dict(batch=batch, size=size, ms=dense*1e3), ours_share=ours/dense,
                hooks_share=hooks/dense, torch_share=theirs/dense)

def bench_channel(reps, device):
    try: import torch_pruning as pruning
    except ImportError: return 'torch-pruning is not installed'
    import torchvision
    net = torchvision.models.resnet50(weights=None).to(device)
    ours = median(lambda m: SparseMask.magnitude(net, .5, scope='channel', skip=('fc',)), reps, device)
    def theirs(_):
        graph = pruning.DependencyGraph().build_dependency(net,
                                                           example_inputs=torch.randn(1, 3, 64, 64, device=device))
        score = pruning.importance.GroupMagnitudeImportance(p=1)
        for group in graph.get_all_groups(ignored_layers=[net.fc]): score(group)
    t = median(theirs, max(1, reps//2), device)
    return dict(ours_ms=ours*1e3, torch_pruning_ms=t*1e3,
                note='theirs includes the graph of dependencies between layers, which cutting channels needs and a '
                     'mask does not')

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--steps', type=int, default=10)
    a.add_argument('--reps', type=int, default=3)
    a.add_argument('--batch', type=int, default=8)
    a.add_argument('--size', type=int, default=224)
    a.add_argument('--device', default='cpu')
    a.add_argument('--out')
    args = a.parse_args()
    model = tower(args.device)
    mask = SparseMask.magnitude(model, .1)
    machine = torch.cuda.get_device_name() if args.device != 'cpu' else platform.processor() or platform.machine()
    result = dict(machine=machine, threads=torch.get_num_threads(), torch=torch.__version__, weights=mask.total)
    for name,f in (('prune', lambda: bench_prune(model, args.reps, args.device)),
                   ('apply', lambda: bench_apply(model, mask, args.reps, args.device)),
                   *((f'step, {o}',
                      lambda o=o: bench_step(mask, o, args.steps, args.batch, args.size, args.device))
                     for o in OPTIMIZERS), ('channel', lambda: bench_channel(args.reps, args.device))):
        result[name] = f()
        print(name, json.dumps(result[name], indent=1, default=str), flush=True)
    if args.out:
        from opentrans.files import save_json
        save_json(result, args.out)
