"""Proves in ten minutes that opentrans works on a GPU: a line for each check, and one JSON of all figures.

    python benchmarks/gpu_check.py                        on a machine with a CUDA device (`make gpu-check`)
    python benchmarks/gpu_check.py --device cpu --tiny    the same checks in miniature, without one
    python benchmarks/gpu_check.py --only alpha,mask      some of them

The machine needs Python 3.12 and torch 2.11 with torchvision, timm and transformers. What else opentrans imports
is taken from the wheels
in `gpu-bundle/` (`make gpu-bundle`), as far as the machine lacks it; nothing is installed and nothing is fetched.
Each check runs in a process that is started anew after a crash, a full memory or the end of its time, so that
none costs another its turn.
Towers have random weights: what is shown is that the path works, how long it takes and how much memory it needs,
not an accuracy.
"""
import argparse, atexit, contextlib, datetime, importlib.metadata, json, math, multiprocessing, os, shutil, statistics
import sys, tempfile, time, zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {} # name -> (function of a `Setting`, seconds that it may take)

class Skipped(Exception): "A check that needs what this machine does not have."

def check(seconds, name=None):
    "Register a check with the time that it may take on a GPU."
    def register(function):
        CHECKS[name or function.__name__] = function,seconds
        return function
    return register

class Setting:
    "Where the checks run, and how large they are."
    def __init__(self, device, tiny): self.device,self.tiny = device,tiny
    @property
    def cuda(self): return self.device.startswith('cuda')
    def size(self, full, tiny): return tiny if self.tiny else full

    def now(self):
        "The time, when all work that was asked of the device is done."
        import torch
        if self.cuda: torch.cuda.synchronize()
        return time.perf_counter()

    def took(self, work):
        "Seconds of a piece of work."
        began = self.now()
        work()
        return self.now()-began

    def in_turns(self, works, repeats):
        "Median seconds of several pieces of work, which take turns; the first turn is left out."
        times = [[self.took(work) for work in works] for _ in range(repeats+1)][1:]
        return [statistics.median(column) for column in zip(*times)]

    def backbone(self, **options):
        "A CLIP of RN50's build, or a tiny one, with random weights."
        from opentrans.clip import ClipBackbone
        from opentrans.frameworks.contract import tiny_backbone
        return (tiny_backbone() if self.tiny else ClipBackbone.create('RN50', **options)).to(self.device)

# ---------------------------------------------------------------- the checks

def _towers(tiny):
    import open_clip, torch
    from opentrans.clip import ClipBackbone
    torch.manual_seed(0)
    if tiny: return {name: ClipBackbone.create(name).visual for name in ('shapes-rn', 'shapes-vit')}
    return {name: open_clip.create_model(name, pretrained=None).visual for name in ('RN50', 'ViT-L-14')}

@check(120)
def alpha(at):
    "The alphas of all layers, on the device and on the CPU: equal to 1e-6."
    from opentrans.heavy_tail import analyze
    figures = {}
    for name,tower in _towers(at.tiny).items():
        tables = {}
        cpu = at.took(lambda: tables.update(cpu=analyze(tower, device='cpu')))
        tower.to(at.device)
        analyze(tower, device=at.device) # the first call starts the device's linear algebra
        device = at.took(lambda: tables.update(device=analyze(tower, device=at.device)))
        far = float((tables['cpu'].to_frame().alpha-tables['device'].to_frame().alpha).abs().max())
        figures[name] = dict(layers=len(tables['cpu']), cpu_seconds=cpu, device_seconds=device, difference=far)
        assert far <= 1e-6, f'alpha of {name} differs by {far:.1e}'
    return figures

def _compiler(at): return at.size('inductor', 'aot_eager') # in miniature the graph is taken, and no kernels are written

def _steps(at, backbone, mask, more, compiled=False):
    "A function that makes one training step, with a mask in force or without."
    import torch
    batch,side = at.size(32, 2),at.size(224, 64)
    images = torch.rand(batch, 3, side, side, device=at.device)
    model = torch.compile(backbone.visual, backend=_compiler(at)) if compiled else backbone.visual
    opt = torch.optim.AdamW(backbone.visual.parameters(), lr=1e-4, **more)
    held = mask.apply(backbone) if mask is not None else None
    def step():
        opt.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16): loss = model(images).square().mean()
        loss.backward()
        opt.step()
    return step,held

MOST_OVERHEAD = .01 # Share of a training step that a mask in force may add on a GPU

def _check_zeros(mask, model):
    "Pruned weights are exactly zero, and others are not."
    weights = mask.weights(model)
    assert all(not w[~mask[n].to(w.device)].any() for n,w in weights.items()), 'a pruned weight is not zero'
    assert any(w.any() for w in weights.values()), 'all weights are zero'

def _in_force(at, more, compiled=False):
    "What a mask costs in a step, and that its zeros are exact."
    import torch
    from opentrans.pruning import SparseMask
    torch.manual_seed(0)
    masked,dense = at.backbone(),at.backbone()
    mask = SparseMask.random(masked, .1, seed=0)
    with_mask,held = _steps(at, masked.train(), mask, more, compiled)
    without,_ = _steps(at, dense.train(), None, more, compiled)
    for step in (with_mask, without): step()
    one,other = at.in_turns([with_mask, without], at.size(15, 1))
    _check_zeros(mask, masked)
    held.remove()
    figures = dict(step_ms=one*1e3, without_mask_ms=other*1e3, overhead=one/other-1)
    if at.cuda and not at.tiny:
        assert figures['overhead'] < MOST_OVERHEAD, f'a mask in force costs too much: {figures}'
    return figures

@check(60)
def mask(at):
    "A mask in force under AdamW, plain, foreach and fused, in mixed precision."
    kinds = dict(plain=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))
    return {name: _in_force(at, more) for name,more in kinds.items()}

@check(150)
def compiled(at):
    "The same under torch.compile."
    return dict(_in_force(at, {}, compiled=True), compiler=_compiler(at))

@check(90)
def imp(at):
    "Algorithm 1 in three rounds, by distillation."
    from opentrans.data import ShapesWorld
    from opentrans.distill import DistillTrainer
    from opentrans.pruning import imp as algorithm_1
    iterations,batch = at.size(30, 1),at.size(16, 2)
    world = ShapesWorld('train', n=at.size(64, 4), size=at.size(224, 64))
    clip = at.backbone()
    train = DistillTrainer(clip, world, iterations=iterations, batch_size=batch, precision='bf16')
    found = []
    seconds = at.took(lambda: found.append(algorithm_1(clip, train, schedule=[.7, .4, .1])))
    mask,history = found[0]
    assert abs(mask.density-.1) < 1e-3 and len(history) == 3
    _check_zeros(mask, clip)
    return (dict(rounds=3, images_per_second=3*iterations*batch/seconds, seconds=seconds,
                 loss=list(map(float, history.loss))) | _memory(at))

def _memory(at):
    "The most that the device has held, in GiB."
    import torch
    return dict(gib=torch.cuda.max_memory_allocated()/2**30) if at.cuda else {}

def _free():
    "Give back what the device holds and nothing needs."
    import torch
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

def _fine_tune(at, framework):
    "Training steps of a framework at the paper's size; the batch is cut into more parts until it fits."
    import torch
    from opentrans.processes import train_step
    from opentrans.training import build_optimizer, Recipe
    from opentrans.frameworks import build, get_framework
    from opentrans.frameworks.checks import _Case
    from opentrans.runtime import to_device
    recipe = Recipe.paper(framework)
    if at.tiny: recipe = recipe.replace(batch_size=2, crop=64)
    names = [f'thing {i}' for i in range(at.size(133, 5))]
    stride = get_framework(framework).output_stride
    options = dict(preset='small') if at.tiny else {}
    seg = build(framework, at.backbone(output_stride=stride), vocabulary=names, seed=0, **options)
    opt = build_optimizer(seg, recipe)
    made = _Case(framework, None, names).batch(recipe.batch_size, (recipe.crop, recipe.crop))
    batch = to_device(made, at.device)
    for parts in (1, 2, 4, 8, 16):
        if parts > recipe.batch_size: break
        with contextlib.suppress(torch.OutOfMemoryError):
            now,losses = recipe.replace(accumulate=parts),[]
            first = at.took(lambda: train_step(seg, batch, opt, now))
            seconds = at.took(lambda: losses.append(train_step(seg, batch, opt, now)))
            assert losses[0] and all(math.isfinite(value) for value in losses[0].values()), f'losses {losses[0]}'
            return (dict(side=recipe.crop, batch=recipe.batch_size, parts=parts, first_seconds=first,
                         seconds=seconds) | _memory(at))
        opt.zero_grad(set_to_none=True) # it did not fit
        if at.cuda: _free()
    raise MemoryError(f'{framework} does not fit in 16 parts')

def add_frameworks():
    "A check for each framework on the list; what takes longest, the compiler, comes last."
    from opentrans.frameworks import list_frameworks
    for name in list_frameworks(): check(60, f'finetune {name}')(lambda at, name=name: _fine_tune(at, name))
    CHECKS['compiled'] = CHECKS.pop('compiled')

@check(30)
def semi_structured(at):
    "What 2:4 sparsity gives on hardware that has it."
    if not at.cuda: raise Skipped('needs CUDA')
    import torch
    from opentrans.pruning import SparseMask
    if torch.cuda.get_device_capability() < (8, 0): raise Skipped('needs a card of compute capability 8.0')
    torch.manual_seed(0)
    layer = torch.nn.Linear(4096, 4096, bias=False, device=at.device, dtype=torch.float16)
    SparseMask.magnitude(layer, .5, scope='2:4', skip_first=False).apply(layer).remove()
    x = torch.randn(4096, 4096, device=at.device, dtype=torch.float16)
    sparse = torch.nn.Linear(4096, 4096, bias=False, device=at.device, dtype=torch.float16)
    sparse.weight = torch.nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()),
                                       requires_grad=False)
    with torch.inference_mode():
        far = float((layer(x)-sparse(x)).abs().max())
        one,other = at.in_turns([lambda: sparse(x), lambda: layer(x)], 30)
    assert far < .1, f'the sparse layer differs by {far}'
    return dict(sparse_ms=one*1e3, dense_ms=other*1e3, speedup=other/one, difference=far)

@check(40)
def one_process(at):
    "A group of one process: NCCL on a GPU, gloo without one."
    import torch
    import torch.distributed as dist
    kind = 'nccl' if at.cuda else 'gloo'
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(kind, init_method=f'file://{folder}/group', rank=0, world_size=1)
        try:
            rows = torch.arange(4., device=at.device)
            dist.all_reduce(rows)
            parts = [torch.empty_like(rows)]
            dist.all_gather(parts, rows)
            assert parts[0].tolist() == [0, 1, 2, 3]
        finally: dist.destroy_process_group()
    return dict(kind=kind)

@check(60)
def determinism(at):
    "The same seed twice: are losses and weights the same?"
    import torch
    from opentrans.data import ShapesWorld
    from opentrans.frameworks import build
    from opentrans.training import finetune, Recipe
    world = ShapesWorld('train', n=4, size=at.size(128, 64))
    runs = []
    for _ in range(2):
        seg = build('deeplabv3', at.backbone(), vocabulary=world.vocabulary, preset='small', seed=0)
        history = finetune(seg, world, Recipe.tiny().replace(iterations=at.size(10, 2), batch_size=2, seed=1))
        runs.append((list(history.loss), torch.cat([p.detach().flatten() for p in seg.parameters()])))
    losses = max(abs(a-b) for a,b in zip(runs[0][0], runs[1][0]))
    weights = float((runs[0][1]-runs[1][1]).abs().max())
    assert losses < 1e-2*max(map(abs, runs[0][0])), f'losses differ by {losses}'
    return dict(exact=losses == weights == 0, losses_differ=losses, weights_differ=weights)

@check(40)
def sparse(at):
    "What a mask of density 0.1 saves in fact: nothing in a dense kernel; in a sparse one (CSR), this."
    import torch
    from opentrans.pruning import SparseMask
    torch.manual_seed(0)
    n = at.size(4096, 256)
    layer = torch.nn.Linear(n, n, bias=False, device=at.device)
    x = torch.randn(n, n, device=at.device)
    with torch.inference_mode():
        dense = at.in_turns([lambda: layer(x)], at.size(20, 3))[0]
        SparseMask.magnitude(layer, .1, skip_first=False).apply(layer).remove()
        rows = layer.weight.detach().to_sparse_csr()
        masked,csr = at.in_turns([lambda: layer(x), lambda: rows @ x.T], at.size(20, 3))
        far = float((layer(x)-(rows @ x.T).T).abs().max())
    assert far < 1e-2, f'the sparse product differs by {far}'
    return dict(dense_ms=dense*1e3, masked_ms=masked*1e3, csr_ms=csr*1e3,
                density=float((layer.weight != 0).float().mean()))

# ---------------------------------------------------------------- running them

def add_bundle(folder):
    "Make importable what the machine lacks and the bundle has; returns the folder of it, or None."
    wheels = sorted(Path(folder).glob('*.whl')) if folder else []
    lacking = [w for w in wheels if not _installed(w.name.split('-')[0])]
    if not lacking: return None
    site = tempfile.mkdtemp(prefix='gpu-check-')
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    for wheel in lacking: zipfile.ZipFile(wheel).extractall(site)
    return site

def _installed(distribution):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(distribution))
    return False

def _path(site):
    "The repository first, the bundle last."
    for folder in (str(ROOT), *([site] if site else [])):
        if folder not in sys.path: sys.path.insert(0, folder) if folder == str(ROOT) else sys.path.append(folder)

def work(pipe, device, tiny, site):
    "In a process of its own: run the checks that are asked for, one by one."
    os.environ['OPENTRANS_PROGRESS'] = '0'
    _path(site)
    import warnings
    warnings.simplefilter('ignore')
    import torch
    add_frameworks()
    if device == 'cpu':
        torch.set_num_threads(max(1, int(os.environ.get('OMP_NUM_THREADS', torch.get_num_threads()))))
    pipe.send('ready')
    while (name := pipe.recv()) is not None:
        if device != 'cpu': _free()
        try: pipe.send(('ok', CHECKS[name][0](Setting(device, tiny))))
        except Skipped as why: pipe.send(('skipped', str(why)))
        except Exception as error: pipe.send(('failed', f'{type(error).__name__}: {error}'[:2000]))

class Worker:
    "The process that runs checks, started anew when it is gone."
    def __init__(self, *args): self.args,self.process,self.pipe = args,None,None

    def start(self):
        context = multiprocessing.get_context('spawn')
        self.pipe,theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *self.args), daemon=False)
        self.process.start()
        theirs.close()
        self._hear(180)

    def _hear(self, seconds):
        "What the process says, within a time."
        if not self.pipe.poll(seconds): raise TimeoutError(f'no answer within {seconds:.0f} s')
        return self.pipe.recv()

    def end(self):
        if self.process is None: return
        self.process.kill()
        self.process.join()
        self.process = None

    def run(self, name, seconds):
        "(state, figures or reason) of a check. The end of the process or of the time is a failure like any other."
        try:
            if self.process is None: self.start()
            self.pipe.send(name)
            return self._hear(seconds)
        except (EOFError, OSError, TimeoutError) as error:
            self.end()
            return 'failed',f"{str(error) or 'the process ended'}"

    def close(self):
        with contextlib.suppress(OSError, AttributeError): self.pipe.send(None)
        if self.process is not None: self.process.join(20)
        self.end()

def versions(device):
    "What the figures were made on."
    import platform
    import torch
    found = {name: importlib.metadata.version(name)
             for name in ('torch', 'torchvision', 'timm', 'transformers', 'open_clip_torch') if _installed(name)}
    card = torch.cuda.get_device_name() if device != 'cpu' else None
    return dict(card=card, python=platform.python_version(), cuda=torch.version.cuda, cores=os.cpu_count(), **found)

def say(name, state, told, seconds):
    "A line of one check."
    figures = told if isinstance(told, str) else json.dumps(told, default=lambda x: f'{x:.4g}')
    print(f'{state:8} {name:22} {seconds:6.1f} s  {figures[:240]}', flush=True)

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda', help='cuda or cpu')
    parser.add_argument('--tiny', action='store_true', help='everything in miniature')
    parser.add_argument('--only', default='', help='names of checks with commas; empty for all')
    parser.add_argument('--bundle', default=ROOT/'gpu-bundle',
                        help='folder of wheels that make gpu-bundle has filled')
    parser.add_argument('--minutes', type=float, default=8, help='what is not done by then is left')
    parser.add_argument('--out', help='JSON file; none: benchmarks/gpu_check.json on a GPU, nothing on a CPU')
    given = parser.parse_args(arguments)
    site = add_bundle(given.bundle)
    _path(site)
    import torch
    if given.device != 'cpu' and not torch.cuda.is_available():
        print('There is no CUDA device here. Try --device cpu --tiny.')
        return 2
    add_frameworks()
    wanted = [n.strip() for n in given.only.split(',') if n.strip()] or list(CHECKS)
    if strange := [n for n in wanted if n not in CHECKS]:
        print(f"There is no check {strange[0]!r}. Choose among: {', '.join(CHECKS)}.")
        return 2
    out = given.out or (ROOT/'benchmarks'/'gpu_check.json' if given.device != 'cpu' else None)
    result = dict(date=datetime.date.today().isoformat(), device=given.device, tiny=given.tiny,
                  **versions(given.device), checks={})
    worker,began = Worker(given.device, given.tiny, site),time.monotonic()
    try:
        for name in wanted:
            start = time.monotonic()
            left = given.minutes*60 - (start-began)
            state,told = worker.run(name, min(CHECKS[name][1], left)) if left > 0 else ('failed', 'the time was up')
            seconds = time.monotonic()-start
            say(name, state, told, seconds)
            result['checks'][name] = dict(state=state, wall_seconds=round(seconds, 2),
                                          **(told if isinstance(told, dict) else dict(why=told)))
            if out: save(result, out)
    finally: worker.close()
    states = [c['state'] for c in result['checks'].values()]
    print(
        f"{states.count('ok')} ok, {states.count('skipped')} skipped, {states.count('failed')} failed, "
        f"{time.monotonic()-began:.0f} s")
    return int('failed' in states)

def save(result, out):
    "Write the file whole, after each check, so that what was found is kept whatever comes."
    from opentrans.files import save_text
    save_text(json.dumps(result, indent=1)+'\n', out)

if __name__ == '__main__': sys.exit(main())
