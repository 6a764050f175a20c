"""CKA of opentrans beside cka-pytorch and torch-cka: time, memory and truth, on the same features.

    OMP_NUM_THREADS=1 python benchmarks/bench_cka.py [--reps 3] [--batches 4] [--out cka.json]

Two RN50 towers with random weights see a batch of random 64x64 pictures; their features are kept and replayed,
so that what is timed is CKA alone.
The three tools take turns in one process; times are processor seconds (run it with one thread), and a ratio is
the median of the ratios of each turn. Truth is the closed form of the minibatch estimator in float64.
Memory is the most that torch's allocator held above the features themselves. The last table is a whole run,
forward passes included.
"""
import argparse, os, platform, time, warnings
import numpy as np
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from opentrans.cka import cka
from opentrans.cost import peak_memory

warnings.filterwarnings('ignore')
os.environ.update(TQDM_DISABLE='1', OPENTRANS_PROGRESS='0') # torch-cka and ours

def tower(seed):
    torch.manual_seed(seed)
    m = ModifiedResNet([3, 4, 6, 3], 1024, 32, image_size=64)
    for n,p in m.named_parameters():
        if n.endswith('bn3.weight'): nn.init.ones_(p) # open_clip starts them at 0: every block an identity
    m.attnpool = nn.Identity()
    for b in m.modules():
        # statistics of one batch, so that features are of a usual size
        if isinstance(b, nn.BatchNorm2d): b.momentum = 1.
    with torch.no_grad(): m.train()(torch.randn(32, 3, 64, 64))
    return m.eval()

def features(m, x, names):
    seen,mods = {},dict(m.named_modules())
    hooks = [mods[n].register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, o.clone())) for n in names]
    with torch.no_grad(): m(x)
    for h in hooks: h.remove()
    return [seen[n] for n in names]

class Replay(nn.Module):
    "A model whose layers give what they are told to give."
    def __init__(self, feats):
        super().__init__()
        self.outs,self.feats = nn.ModuleList(nn.Identity() for _ in feats),feats
        self.p = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        for m,f in zip(self.outs, self.feats): m(f)
        return x

def ours(a, b, loader, names): return cka(a, b, loader, names).to_numpy()

def cka_pytorch(a, b, loader, names, epsilon=1e-4):
    from cka_pytorch import CKACalculator
    c = CKACalculator(a, b, model1_layers=names, model2_layers=names, verbose=False)
    try: return c.calculate_cka_matrix([(x, 0) for x in loader], num_epochs=1, epsilon=epsilon).numpy()
    finally: c.reset()

class _Loader(list): dataset = 'x'

def torch_cka(a, b, loader, names):
    from torch_cka import CKA
    with torch.no_grad():
        c = CKA(a, b, 'a', 'b', model1_layers=names, model2_layers=names)
        c.compare(_Loader([(x,) for x in loader]))
        for m in (*a.modules(), *b.modules()): m._forward_hooks.clear() # it never removes them
        return c.export()['CKA'].numpy()

def truth(fa, fb):
    """Closed form of the unbiased estimator on one batch (the replayed batches are equal, so it is that of all of
    them)."""
    def u(x):
        x = x.double().flatten(1)
        K = x@x.T
        K.fill_diagonal_(0)
        n = len(K)
        r = K.sum(1)/(n-2)
        K = K - r[:, None] - r[None] + r.sum()/(n-1)
        K.fill_diagonal_(0)
        return K.flatten()
    A,B = torch.stack([u(x) for x in fa]),torch.stack([u(x) for x in fb])
    return ((A@B.T)/((A*A).sum(1)[:, None]*(B*B).sum(1)).sqrt()).numpy()

def turns(tools, reps):
    times = {k: [] for k in tools}
    for _ in range(reps):
        for k,f in tools.items():
            t = time.process_time()
            f()
            times[k].append(time.process_time()-t)
    return {k: np.array(v) for k,v in times.items()}

def case(title, names, n, batches, reps, slow=True):
    x = torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fa,fb = features(tower(0), x, names),features(tower(1), x, names)
    a,b = Replay(fa),Replay(fb)
    outs,loader = [f'outs.{i}' for i in range(len(names))],[x]*batches
    fs = {'opentrans': ours, 'cka-pytorch': cka_pytorch, **({'torch-cka': torch_cka} if slow else {})}
    want = truth(fa, fb)
    rows = {k: dict(error=float(abs(f(a, b, loader, outs)-want).max())) for k,f in fs.items()} # also the warm-up
    t = turns({k: (lambda f=f: f(a, b, loader, outs)) for k,f in fs.items()}, reps)
    for k,f in fs.items():
        rows[k] |= dict(seconds=t[k].min(), ratio=float(np.median(t[k]/t['opentrans'])),
                        mib=peak_memory(lambda: f(a, b, loader, outs))/2**20)
    rows['cka-pytorch, epsilon=0'] = dict(error=float(abs(cka_pytorch(a, b, loader, outs, 0.)-want).max()))
    print(
        f'\n{title}, {batches} batches of {n}\n\n| tool | CKA only, s | x ours | largest error | extra memory, MiB '
        f'|\n|---|--:|--:|--:|--:|')
    for k,r in rows.items():
        print(f"| {k} | "
              + ' | '.join(f.format(r[c]) if c in r else ''
                           for c,f in (('seconds', '{:.2f}'), ('ratio', '{:.2f}'), ('error', '{:.1e}'),
                                       ('mib', '{:.0f}'))) + ' |')
    return rows

def whole_run(names, n, batches, reps):
    x = torch.randn(n, 3, 64, 64)
    a,b = tower(0),tower(1)
    def forward():
        with torch.no_grad(): [m(x) for _ in range(batches) for m in (a, b)]
    t = turns({'forward of both alone': forward, 'opentrans': lambda: ours(a, b, [x]*batches, names)}, reps)
    r = float(np.median(t['opentrans']/t['forward of both alone']))
    print(
        f"\nWhole run, {len(names)} block outputs: {t['opentrans'].min():.2f} s, the forward passes alone "
        f"{t['forward of both alone'].min():.2f} s, ratio {r:.2f}")
    return dict(ratio=r, **{k: v.min() for k,v in t.items()})

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--batches', type=int, default=4)
    p.add_argument('--out')
    p.add_argument('--quick', action='store_true', help='one small case, for a test of this file')
    args = p.parse_args()
    m = tower(0)
    blocks = [n for n,x in m.named_modules() if type(x).__name__ == 'Bottleneck']
    convs = [n for n,x in m.named_modules() if isinstance(x, nn.Conv2d)]
    print(
        f'torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}, Python '
        f'{platform.python_version()}')
    if args.quick: res = dict(blocks=case('Last 4 block outputs of RN50', blocks[-4:], 16, 1, 1))
    else:
        res = dict(blocks=case('16 block outputs of RN50', blocks, 64, args.batches, args.reps),
                   convs=case('55 convolutions of RN50', convs, 256, 1, args.reps, slow=False),
                   whole=whole_run(blocks, 64, 2, args.reps))
    if args.out:
        from opentrans.files import save_json
        save_json(res, args.out)
