"""The sparse engine beside the fastest living dense engine: CLIP's RN50 trunk, onnxruntime dense, float32,
interleaved.

    python benchmarks/bench_sparse.py [--sizes 224 512 640] [--densities uniform imp] [--threads 1 2] [--pairs
    30] [--out benchmarks/bench_sparse.json]

uniform  each layer but the first keeps a tenth of its weights, at random places
imp      a tenth of all weights, the share of each layer as a global mask by magnitude leaves it on the small
trained CLIP of the
         package (`shapes-rn`), carried to RN50 by the layer's stage and place, scaled to a tenth of RN50's weights
Values are random: neither engine's time depends on them. One pair is one call of each, in turns. With one
thread, times are the CPU time
of the process, which other work on the machine disturbs little; with more threads they are wall time. A ratio is
of one pair; its
median and quartiles are stored, and the ratio of the shortest calls.
"""
import argparse, json, os, platform, tempfile, time, warnings
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch
from torch import nn
from opentrans import sparse
from opentrans.files import save_json
from opentrans.pruning import SparseMask

warnings.simplefilter('ignore')

def tower():
    "CLIP's RN50 without its attention pool, batch norms as after training."
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    net = ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64).eval()
    net.attnpool = nn.Identity()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, .1)
            part.running_var.uniform_(.5, 1.5)
            part.weight.data.uniform_(.5, 1.)
    return net

def place(name):
    "A layer's stage and its place in a block, as `layer2.conv3`; the stem's layers as they are."
    stage, *rest = name.removesuffix('.weight').split('.')
    return '.'.join([stage, rest[1]]) if rest else stage

def imp_like(net, density):
    "How many weights each layer keeps: as the trained small CLIP has it, scaled to the density."
    from opentrans.clip import ClipBackbone
    small = SparseMask.magnitude(ClipBackbone.create('shapes-rn', pretrained='shapes-rn'), density).table().density
    share = {place(name): value for name, value in small.items()}
    layers = SparseMask.ones(net).shapes
    size = {name: int(np.prod(shape)) for name, shape in layers.items()}
    want = density*sum(size.values())
    low = 0.
    high = 10.
    for _ in range(60):
        factor = (low + high)/2
        total = sum(n*min(1, factor*share[place(name)]) for name, n in size.items())
        low, high = (factor, high) if total < want else (low, factor)
    return {name: min(1., factor*share[place(name)]) for name in size}

def masked(net, kind, density):
    "The mask, with each layer's share of weights at random places."
    shares = imp_like(net, density) if kind == 'imp' else dict.fromkeys(SparseMask.ones(net).names, density)
    g = torch.Generator().manual_seed(0)
    mask = SparseMask({name: torch.rand(shape, generator=g) < shares[name]
                       for name, shape in SparseMask.ones(net).shapes.items()})
    mask.apply(net).remove()
    return mask

def dense_engine(net, path, threads):
    "onnxruntime on the same network."
    import onnxruntime
    axes = {'x': {0: 'b', 2: 'h', 3: 'w'}}
    torch.onnx.export(net, torch.randn(1, 3, 224, 224), path, dynamo=False, opset_version=13, input_names=['x'],
                      dynamic_axes=axes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'x': x.numpy()})[0]

def pairs(a, b, x, count, clock):
    "Times of both, in turns."
    times = []
    for _ in range(count):
        start = clock()
        a(x)
        middle = clock()
        b(x)
        times.append((middle - start, clock() - middle))
    return np.array(times)

def told(times):
    "Milliseconds and ratios of pairs."
    ratio = times[:, 0]/times[:, 1]
    return dict(dense_ms=float(times[:, 0].min()*1e3), ours_ms=float(times[:, 1].min()*1e3),
                dense_median_ms=float(np.median(times[:, 0])*1e3),
                ours_median_ms=float(np.median(times[:, 1])*1e3),
                ratio_of_shortest=float(times[:, 0].min()/times[:, 1].min()), ratio_median=float(np.median(ratio)),
                ratio_quartiles=[float(q) for q in np.quantile(ratio, [.25, .75])], pairs=len(times))

def processor():
    "The processor's name and what it has."
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')),
                platform.processor())
    return dict(name=name, cores=os.cpu_count(), vector=sparse.Machine.host().width,
                llvm_name=sparse.Machine.host().cpu)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 512, 640])
    parser.add_argument('--densities', nargs='+', default=['uniform', 'imp'])
    parser.add_argument('--threads', type=int, nargs='+', default=[1])
    parser.add_argument('--density', type=float, default=.1)
    parser.add_argument('--pairs', type=int, default=30)
    parser.add_argument('--out', default=None)
    a = parser.parse_args()
    import onnxruntime, llvmlite
    result = dict(processor=processor(),
                  versions=dict(torch=torch.__version__, onnxruntime=onnxruntime.__version__,
                                llvmlite=llvmlite.__version__),
                  load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None, rows=[])
    for kind in a.densities:
        net = tower()
        mask = masked(net, kind, a.density)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for threads in a.threads:
                torch.set_num_threads(threads)
                dense, fast = dense_engine(net, f'{folder}/net.onnx', threads), sparse.compile(net, threads=threads)
                for size in a.sizes:
                    x = torch.randn(1, 3, size, size)
                    want, got = dense(x), fast(x).numpy()
                    clock = time.process_time if threads == 1 else time.perf_counter
                    row = dict(density=kind, kept=mask.density, size=size, threads=threads, clock=clock.__name__,
                               error=float(abs(want - got).max()/abs(want).max()))
                    plan = next(reversed(fast.sparse_regions[0].plans.values()))
                    work = plan.table()
                    row['multiply_adds_kept'] = float(
                        work.multiply_adds.sum()/(work.weights*work.height*work.width).sum())
                    row |= told(pairs(dense, fast, x, max(5, a.pairs*224**2//size**2), clock))
                    result['rows'].append(row)
                    print(json.dumps(row), flush=True)
                    if a.out: save_json(result, a.out)

if __name__ == '__main__': main()
