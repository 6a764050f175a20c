"""High-resolution cross-attention (HRCA) beside full cross-attention at 1/4 of the image's size: time and peak
memory, in one run.

    OMP_NUM_THREADS=1 python benchmarks/bench_hrca.py [--size 512] [--batch 1] [--reps 5] [--device cpu] [--out
    hrca.json]

Both have the same weights and inputs (100 queries, 256 channels, 8 heads), and read the map of 1/4 with its
positional encodings. HRCA also chooses its cells, by the attention on the map of 1/32.
They take turns; a ratio is the median of the ratios of each turn. 'training' is forward and backward, to the
map's gradient. Two forms of full attention are timed: with weights (as the thesis's code, which keeps them) and
fused, without.
The equality of both where HRCA may read all cells is checked first. The decoder is FASeg's whole one at full
size, with HRCA and with all cells read.
"""
import argparse, platform, time
import numpy as np
import torch
from torch import nn
from opentrans.files import save_json
from opentrans.cost import peak_memory
from opentrans.experiments import hardware
from opentrans.frameworks.faseg import FASegDecoder, HighResCrossAttention

def inputs(size, batch, dim, queries, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    def make(*s): return torch.randn(*s, generator=g).to(device)
    h = size//4
    return dict(q=make(batch, queries, dim), qp=make(batch, queries, dim),
                f=make(batch, dim, h, h).requires_grad_(), p=make(batch, dim, h, h),
                low=make(batch, queries, (size//32)**2).softmax(-1))

def full(attention, d, weights): # cross-attention to every pixel
    v = d['f'].flatten(2).mT
    return nn.MultiheadAttention.forward(attention, d['q'] + d['qp'], v + d['p'].flatten(2).mT, v,
                                         need_weights=weights)[0]

def hrca(attention, d, ratio=32):
    return attention(d['q'], d['f'], d['p'], d['low'], d['qp'], ratio, need_weights=False)[0]

def wait(device):
    if device != 'cpu': torch.cuda.synchronize()

def seconds(step, device):
    wait(device)
    t = time.perf_counter() if device != 'cpu' else time.process_time()
    step()
    wait(device)
    return (time.perf_counter() if device != 'cpu' else time.process_time()) - t

def turns(steps, reps, device):
    for f in steps.values(): f()
    times = {k: [] for k in steps}
    for _ in range(reps):
        for k,f in steps.items(): times[k].append(seconds(f, device))
    return {k: np.array(v) for k,v in times.items()}

def table(title, steps, reps, device, base):
    t,rows = turns(steps, reps, device),{}
    for k,f in steps.items():
        rows[k] = dict(seconds=float(np.median(t[k])), ratio=float(np.median(t[k]/t[base])),
                       mib=peak_memory(f, device)/2**20)
    print(f'\n{title}\n\n| way | ms | x HRCA | peak memory, MiB | x HRCA |\n|---|--:|--:|--:|--:|')
    for k,r in rows.items():
        print(
            f"| {k} | {1e3*r['seconds']:.1f} | {r['ratio']:.2f} | {r['mib']:.1f} | "
            f"{r['mib']/rows[base]['mib']:.2f} |")
    return rows

def layer(size, batch, reps, device, dim=256, queries=100, heads=8):
    torch.manual_seed(0)
    attention,d = HighResCrossAttention(dim, heads).to(device),inputs(size, batch, dim, queries, device)
    with torch.no_grad(): gap = (hrca(attention, d, 1) - full(attention, d, True)).abs().max().item()
    assert gap < 1e-4, gap
    ways = {'HRCA': lambda: hrca(attention, d), 'full, fused': lambda: full(attention, d, False),
            'full, with weights': lambda: full(attention, d, True)}
    def inference(f):
        def step():
            with torch.no_grad(): f()
        return step
    def training(f):
        def step(): torch.autograd.grad(f().sum(), [d['f'], *attention.parameters()])
        return step
    cells = (size//32)**2
    print(
        f'\n{max(1, cells//32)} of {cells} cells, {max(1, cells//32)*64} of {(size//4)**2} pixels; largest '
        f'difference where all are read: {gap:.1e}')
    return dict(gap=gap,
                inference=table(f'One layer, {batch} x {size}x{size}, inference',
                                {k: inference(f) for k,f in ways.items()}, reps, device, 'HRCA'),
                training=table(f'One layer, {batch} x {size}x{size}, training',
                               {k: training(f) for k,f in ways.items()}, reps, device, 'HRCA'))

def decoder(size, batch, reps, device, dim=256):
    torch.manual_seed(0)
    net = FASegDecoder().to(device)
    g = torch.Generator().manual_seed(0)
    maps,codes = ([torch.randn(batch, dim, size//s, size//s, generator=g).to(device) for s in (32, 16, 8, 4)]
                  for _ in range(2))
    def step(ratio):
        def f():
            net.ratio = ratio
            for p in net.parameters(): p.grad = None
            sum(q.mean() + m.mean() for q,m in net(maps[3], maps, codes)).backward()
        return f
    return table(f'Whole decoder (13 blocks), {batch} x {size}x{size}, training',
                 {'HRCA': step(32), 'all cells': step(1)}, reps, device, 'HRCA')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--batch', type=int, default=1)
    p.add_argument('--reps', type=int, default=5)
    p.add_argument('--device', default='cpu')
    p.add_argument('--out')
    p.add_argument('--quick', action='store_true', help='one small case, for a test of this file')
    args = p.parse_args()
    print(
        f'torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.device}, {platform.machine()}, '
        f'Python {platform.python_version()}')
    size,reps = (192, 1) if args.quick else (args.size, args.reps)
    res = dict(layer=layer(size, args.batch, reps, args.device))
    if not args.quick: res['decoder'] = decoder(size, args.batch, max(1, reps//2), args.device)
    if args.out:
        save_json(dict(what='HRCA beside full cross-attention at 1/4',
                       run=dict(
                           command=f'python benchmarks/bench_hrca.py --size {size} --batch {args.batch} --reps '
                           f'{reps} --device {args.device}', threads=torch.get_num_threads(), **hardware()),
                       **res), args.out)
