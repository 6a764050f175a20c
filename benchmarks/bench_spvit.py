"""Latency and peak memory of the published SPViT-DeiT-S beside the dense DeiT-S, in one run, in turns (random
weights: neither depends on their values).

    OMP_NUM_THREADS=1 python benchmarks/bench_spvit.py [--spec deit_s] [--batches 1 8 32] [--reps 9] [--size 224]
    [--device cpu] [--out benchmarks/bench_spvit.json]

latency   median and quartiles of the time of one forward pass; each repetition runs the dense and the slimmed
model one after the other, the first two are left out
memory    peak of a forward pass above what was allocated before, from the allocator; and the bytes of the
parameters
flops     the hand count of thesis chapter 4 (exact), so that the measured ratio stands beside the counted one
"""
import argparse, json, platform, statistics, time
from datetime import date
import timm, torch
from opentrans.files import save_json
from opentrans.cost import peak_memory
from opentrans.vit.hybrids import HybridSpec, SPVIT_PUBLISHED, SPViTCost

def models(spec, device):
    "The dense model, and the hybrid made of it."
    torch.manual_seed(0)
    dense = timm.create_model(SPVIT_PUBLISHED[spec]['model']).eval()
    return dict(dense=dense.to(device), spvit=HybridSpec.published(spec).build(dense).eval().to(device))

@torch.no_grad()
def bench(nets, batch, size, reps, device):
    x,times = torch.randn(batch, 3, size, size, device=device),{k: [] for k in nets}
    sync = torch.cuda.synchronize if device != 'cpu' else (lambda: None)
    for i in range(reps+2):
        # in turns, and not always the same one first
        for k in (nets if i % 2 else reversed(nets)):
            sync()
            t = time.perf_counter()
            nets[k](x)
            sync()
            if i > 1: times[k].append((time.perf_counter()-t)*1e3)
    def q(v): return statistics.quantiles(v, n=4) if len(v) > 1 else [v[0]]*3
    res = {k: dict(ms=round(q(v)[1], 2), quartiles=[round(q(v)[0], 2), round(q(v)[2], 2)],
                   peak_bytes=peak_memory(lambda: nets[k](x), device)) for k,v in times.items()}
    return dict(batch=batch, **res, time_ratio=round(res['spvit']['ms']/res['dense']['ms'], 3),
                memory_ratio=round(res['spvit']['peak_bytes']/res['dense']['peak_bytes'], 3))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--spec', default='deit_s', choices=[k for k in SPVIT_PUBLISHED if k.startswith('deit')])
    p.add_argument('--batches', type=int, nargs='+', default=[1, 8, 32])
    p.add_argument('--reps', type=int, default=9)
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--device', default='cpu')
    p.add_argument('--out')
    a = p.parse_args()
    nets = models(a.spec, a.device)
    flops = {k: int(SPViTCost(m).flops(m).item()) for k,m in nets.items()}
    params = {k: sum(t.numel() for t in m.parameters()) for k,m in nets.items()}
    res = dict(what=f'SPViT {a.spec} beside its dense model', date=str(date.today()),
               machine=torch.cuda.get_device_name() if a.device != 'cpu' else platform.processor()
               or platform.machine(), threads=torch.get_num_threads(), torch=torch.__version__,
               timm=timm.__version__, size=a.size, reps=a.reps, flops=flops,
               flops_ratio=round(flops['spvit']/flops['dense'], 3), params=params, runs=[])
    for b in a.batches:
        res['runs'].append(bench(nets, b, a.size, a.reps, a.device))
        print(json.dumps(res['runs'][-1]), flush=True)
    print(json.dumps({k: v for k,v in res.items() if k != 'runs'}, indent=1))
    if a.out: save_json(res, a.out)
