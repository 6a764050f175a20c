"""Frameworks at the paper's size: time of inference, beside the reference's own code where it is at hand, and
memory of one training step.

    OMP_NUM_THREADS=2 python benchmarks/bench_frameworks.py [--framework mask2former] [--size 512 512] [--reps 5]
    [--train] [--out frameworks.json]
    OMP_NUM_THREADS=2 python benchmarks/bench_frameworks.py --framework deeplabv3 mask2former --learn 200

--framework is any that `opentrans.frameworks` knows, on CLIP's RN50 (random weights); several may be named.
The reference runs in the same process, on the same maps of the backbone and with the same weights, in turns with
ours; the whole framework (backbone, head, pixels) is timed besides.
    OPENTRANS_MASK2FORMER=folder of facebookresearch/Mask2Former, OPENTRANS_FCCLIP=folder of bytedance/fc-clip;
    one framework a call, as both register the same names (needs detectron2; its compiled operator is replaced by
    its own PyTorch fallback, as ours has none)
--train makes one training step with AdamW on --batch images with --regions regions each, and says what the
allocator gave out at the worst moment, and the largest size of the process.
--learn N trains each framework's small preset N steps on generated scenes, from the small CLIP that ships with
the package, and says its mIoU on other scenes, on names it was trained with and on new ones.
Times are medians of wall-clock seconds. Random weights cost what trained ones do, but for panoptic output, which
depends on how many queries are sure; so semantic output is timed.
"""
import argparse, importlib, importlib.util, json, os, platform, resource, statistics, sys, time, types
import torch
from opentrans.clip import ClipBackbone
from opentrans.cost import peak_memory
from opentrans.frameworks import build, list_frameworks

os.environ.update(OPENTRANS_PROGRESS='0')

def now(device):
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter()

def in_turns(functions, reps, device):
    "Median seconds of each function; the first call of each is left out."
    times = {k: [] for k in functions}
    for _ in range(reps+1):
        for k,f in functions.items():
            t = now(device)
            f()
            times[k].append(now(device)-t)
    return {k: statistics.median(t[1:]) for k,t in times.items()}

def module_of(folder, *names):
    "Modules of a clone, without what its packages import beside (data sets, other backbones)."
    root = names[0].split('.')[0]
    for n in (root, f'{root}.modeling'):
        if n not in sys.modules:
            sys.modules[n] = types.ModuleType(n)
            sys.modules[n].__path__ = [os.path.join(folder, *n.split('.'))]
    for n in ('MultiScaleDeformableAttention', 'cv2'):
        if importlib.util.find_spec(n) is None: sys.modules[n] = types.ModuleType(n)
    return [importlib.import_module(n) for n in names]

def parts_of(variable, package, repository, decoder, seg, **options):
    """Pixel decoder and masked-attention decoder of a clone, as its settings for CLIP's RN50 build them; or why
    there are none."""
    folder = os.environ.get(variable, '')
    if not os.path.isdir(os.path.join(folder, package)): return f'{variable} names no clone of {repository}'
    if importlib.util.find_spec('detectron2') is None: return 'detectron2 is not installed'
    from detectron2.layers import ShapeSpec
    pixel,masker = module_of(folder, f'{package}.modeling.pixel_decoder.msdeformattn',
                             f'{package}.modeling.transformer_decoder.{decoder}')
    shapes = {k: ShapeSpec(channels=c, stride=seg.backbone.strides[k]) for k,c in seg.backbone.channels.items()}
    return torch.nn.ModuleDict(
        dict(pixel_decoder=pixel.MSDeformAttnPixelDecoder(shapes, transformer_dropout=0., transformer_nheads=8,
                                                          transformer_dim_feedforward=1024,
                                                          transformer_enc_layers=6, conv_dim=256, mask_dim=256,
                                                          norm='GN',
                                                          transformer_in_features=['res3', 'res4', 'res5'],
                                                          common_stride=4),
             predictor=masker.MultiScaleMaskedTransformerDecoder(
                 256, True, num_classes=255, hidden_dim=256, nheads=8, dim_feedforward=2048, dec_layers=9,
                 pre_norm=False, mask_dim=256, enforce_input_project=False, **options)))

def mask2former_reference(seg, device):
    "Function of the backbone's maps: the reference's head with the weights that `seg` gets as well."
    from opentrans.frameworks.mask2former import load_mask2former
    theirs = parts_of('OPENTRANS_MASK2FORMER', 'mask2former', 'facebookresearch/Mask2Former',
                      'mask2former_transformer_decoder', seg, num_queries=100)
    if isinstance(theirs, str): return theirs
    load_mask2former(seg, {f'sem_seg_head.{n}': p for n,p in theirs.state_dict().items()})
    theirs.to(device).eval()
    def run(maps):
        fine,_,levels = theirs.pixel_decoder.forward_features(maps)
        return theirs.predictor(levels, fine)['pred_masks']
    return run,lambda maps: seg.head(maps)[1]

def fcclip_reference(seg, device):
    "The same for FC-CLIP: pixel decoder, mask decoder and classification of the queries of all layers."
    from opentrans.frameworks.fcclip import load_fcclip
    theirs = parts_of('OPENTRANS_FCCLIP', 'fcclip', 'bytedance/fc-clip', 'fcclip_transformer_decoder', seg,
                      num_queries=250, clip_embedding_dim=seg.backbone.embed_dim)
    if isinstance(theirs, str): return theirs
    load_fcclip(seg, {f'sem_seg_head.{n}': p for n,p in theirs.state_dict().items()}, strict=False)
    theirs.to(device).eval()
    k = len(seg.vocabulary)
    words = torch.nn.functional.normalize(torch.randn(k+1, seg.backbone.embed_dim,
                                                      generator=torch.Generator().manual_seed(1)), dim=1).to(device)
    def run(maps):
        fine,_,levels = theirs.pixel_decoder.forward_features(maps)
        return theirs.predictor(levels, fine, text_classifier=words, num_templates=[1]*k)['pred_masks']
    def ours(maps):
        out = seg.head(maps, every=True)
        for e,_ in out: torch.nn.functional.normalize(e, dim=-1) @ words.T
        return out[-1][1]
    return run,ours

# name -> function (seg, device): (theirs, ours) of the maps, or why there is none
REFERENCES = dict(mask2former=mask2former_reference, fcclip=fcclip_reference)

def train_batch(b, regions, size, classes, device):
    g = torch.Generator().manual_seed(0)
    h,w = size
    rows = max(1, int(regions**.5))
    cell = (torch.arange(h)[:, None]*rows//h)*-(-regions//rows) + torch.arange(w)*-(-regions//rows)//w
    masks = [cell == i for i in cell.unique().tolist()][:regions]
    kinds = torch.randint(classes, (b, len(masks)), generator=g)
    labels = torch.stack([sum(m.long()*int(c) for m,c in zip(masks, k)) for k in kinds])
    return dict(images=torch.rand(b, 3, h, w, generator=g).to(device), labels=labels.to(device),
                regions=[torch.stack(masks).to(device)]*b, region_classes=list(kinds.to(device)),
                isthing=[torch.ones(len(masks), dtype=torch.bool)]*b, ids=[str(i) for i in range(b)], ignore=255)

def learn(name, iterations, size=80, scenes=640, seed=0):
    "The small preset on ShapesWorld, as `opentrans demo` trains it."
    from opentrans.data import ShapesWorld
    from opentrans.training import evaluate, finetune, Recipe
    world = ShapesWorld('train', n=scenes, size=size, seed=seed)
    other = ShapesWorld('val', n=scenes//4, size=size, seed=seed)
    seg = build(name, ClipBackbone.create('shapes-rn', pretrained='shapes-rn', output_stride=16),
                vocabulary=world.vocabulary, preset='small', seed=seed)
    t = time.process_time()
    finetune(seg, world, Recipe.tiny().replace(iterations=iterations, lr=3e-3, schedule='poly', seed=seed))
    t,e = time.process_time()-t,evaluate(seg, other)
    return dict(framework=name, iterations=iterations, cpu_seconds_a_step=t/iterations, miou=100*e['miou'],
                **{f'miou_{k}': 100*v for k,v in e['groups'].items()}, pixel_accuracy=100*e['pixel_accuracy'])

def bench(name, args):
    names = [f'class {i}' for i in range(args.classes)]
    seg = build(name, ClipBackbone.create(args.backbone, pretrained=None), vocabulary=names, preset=args.preset,
                seed=0).to(args.device)
    g = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, *args.size, generator=g).to(args.device)
    text = torch.nn.functional.normalize(torch.randn(args.classes, seg.backbone.embed_dim, generator=g),
                                         dim=1).to(args.device)
    seg._texts[tuple(names), args.device] = text # the text encoder is no part of this
    res = dict(framework=name, size=args.size, classes=args.classes,
               params=sum(p.numel() for p in seg.parameters()))
    seg.eval()
    with torch.no_grad():
        pair = (REFERENCES[name](seg, args.device) if name in REFERENCES and args.preset == 'paper'
                else 'no reference is known')
        maps = seg.backbone(images)
        todo = dict(backbone=lambda: seg.backbone(images), framework=lambda: seg.semantic(images, text))
        if not isinstance(pair, str):
            theirs,ours = pair
            a,b = theirs(maps),ours(maps)
            res['largest_difference'] = ((a-b).abs().max()/a.abs().max()).item()
            todo.update(head=lambda: ours(maps), reference_head=lambda: theirs(maps))
        else: res['reference'] = pair
        res['seconds'] = in_turns(todo, args.reps, args.device)
    if args.train:
        batch = train_batch(args.batch, args.regions, args.size, args.classes, args.device)
        seg.train()
        opt = torch.optim.AdamW(seg.parameters(), lr=1e-4)
        def step():
            opt.zero_grad()
            sum(seg.loss(batch).values()).backward()
            opt.step()
        weights = sum(p.numel()*p.element_size() for p in seg.parameters())
        t = now(args.device)
        peak = peak_memory(step, args.device)
        t = now(args.device)-t # the first step: gradients and the optimizer's states are born in it
        res['train'] = dict(batch=args.batch, regions=args.regions, weights_gb=weights/1e9,
                            peak_gb=(peak+weights)/1e9,
                            process_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6, seconds_watched=t)
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--framework', nargs='+', default=['mask2former'], choices=list_frameworks())
    p.add_argument('--size', nargs=2, type=int, default=[512, 512])
    p.add_argument('--reps', type=int, default=5)
    p.add_argument('--classes', type=int, default=133)
    p.add_argument('--backbone', default='RN50')
    p.add_argument('--preset', default='paper')
    p.add_argument('--device', default='cpu')
    p.add_argument('--train', action='store_true')
    p.add_argument('--batch', type=int, default=1)
    p.add_argument('--regions', type=int, default=12)
    p.add_argument('--out')
    p.add_argument('--learn', type=int, default=0)
    args = p.parse_args()
    if args.learn:
        rows = [learn(n, args.learn) for n in args.framework]
        for r in rows:
            print('  '.join(f'{k} {v:.2f}' if isinstance(v, float) else f'{k} {v}' for k,v in r.items()),
                  flush=True)
        if args.out:
            with open(args.out, 'w') as f: json.dump(rows, f, indent=1)
        return
    rows = [bench(n, args) for n in args.framework]
    report = dict(results=rows, threads=torch.get_num_threads(), torch=torch.__version__,
                  machine=platform.machine(),
                  device=args.device if args.device == 'cpu' else torch.cuda.get_device_name())
    for r in rows:
        print(
            f"\n{r['framework']} at {r['size'][0]}x{r['size'][1]}, {r['classes']} classes, {r['params']/1e6:.1f} M "
            f"parameters")
        for k,s in r['seconds'].items(): print(f'  {k:16} {s*1e3:10.1f} ms')
        if 'largest_difference' in r:
            print(
                f"  ours takes {r['seconds']['head']/r['seconds']['reference_head']:.2f} of the reference's time "
                f"for the head; masks differ by {r['largest_difference']:.1e} of the largest")
        else: print(f"  no reference beside it: {r['reference']}")
        if 'train' in r:
            print(
                f"  training step, {r['train']['batch']} image(s): {r['train']['peak_gb']:.2f} GB at the worst "
                f"moment, process {r['train']['process_gb']:.2f} GB")
    if args.out:
        with open(args.out, 'w') as f: json.dump(report, f, indent=1)

if __name__ == '__main__': main()
