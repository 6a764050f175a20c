"""FASeg beside Mask2Former on ShapesWorld, with seeds: dense and sparse, other positional queries, and what HRCA looks at (thesis, Tab. 5.5 to 5.7 and Fig. 5.4, at toy scale).

    OMP_NUM_THREADS=1 python benchmarks/study_faseg.py --seeds 5 --out docs/results/faseg-5seeds.json
    OMP_NUM_THREADS=1 python benchmarks/study_faseg.py --seeds 3 --iterations 400 --arms Mask2Former FASeg 'DFPQ alone' 'HRCA alone' --folder runs/faseg-long --out docs/results/faseg-long.json

Each run of the study is a small file in --folder; a run that is there with the same settings is not done again, so that the study can be interrupted.
"""
import argparse, time
from datetime import date
from pathlib import Path
import torch
from opentrans.clip import ClipBackbone
from opentrans.errors import OpenTransError
from opentrans.files import load_json, save_json
from opentrans.runtime import seeded
from opentrans.data import ShapesWorld, collate
from opentrans.experiments import hardware
from opentrans.training import evaluate, finetune, Recipe
from opentrans.frameworks import build
from opentrans.runtime import evaluating
from opentrans.frameworks.mask2former import batch_regions
from opentrans.heavy_tail import analyze
from opentrans.pruning import SparseMask

SCALE = dict(domain='night', size=64, output_stride=16, train=320, val=64, iterations=100, batch_size=8, lr=3e-3, backbone_lr=.5, density=.1,
             head=dict(hidden=64, mask_dim=64, queries=16, pixel_layers=1, heads=4, pixel_ffn=128, ffn=128, points=128, kd=0., region_dropout=0., scale=1/.07, class_weight=2.),
             mask2former=dict(layers=3), faseg=dict(rounds=1, ratio=8))

FEW = 5 # seeds, at most, of the arms that are beside the main comparison
ARMS = { # name -> (framework, its options, sparse?, in the main comparison?)
    'Mask2Former': ('mask2former', {}, False, True), 'Mask2Former, sparse': ('mask2former', {}, True, True),
    'FASeg': ('faseg', {}, False, True), 'FASeg, sparse': ('faseg', {}, True, True),
    'learned queries': ('faseg', dict(dfpq='learned'), False, False), 'learned queries, sparse': ('faseg', dict(dfpq='learned'), True, False),
    'grid': ('faseg', dict(dfpq='grid'), False, False), 'anchor': ('faseg', dict(dfpq='anchor'), False, False), 'foreground': ('faseg', dict(dfpq='foreground'), False, False),
    'full attention': ('faseg', dict(ratio=1), False, False), 'random cells': ('faseg', dict(selection='random'), False, False),
    '1 of 4 cells': ('faseg', dict(ratio=4), False, False), '1 of 16 cells': ('faseg', dict(ratio=16), False, False),
    'DFPQ alone': ('faseg', dict(hrca=False), False, False), 'HRCA alone': ('faseg', dict(dfpq=False, key_pos='sine'), False, False),
    'small alpha frozen': ('faseg', dict(freeze=.5), False, False),
}

def measure(seg, data):
    "How well regions are found by any query: best IoU, mean over regions; for FASeg also how much of that query's attention is inside, and the chosen cells."
    text,iou,inside,cells = seg.text(data.vocabulary),[],[],[]
    for i in range(0, len(data), 16):
        batch = collate([data[j] for j in range(i, min(i+16, len(data)))])
        regions,_ = batch_regions(batch, len(data.vocabulary), batch['ignore'])
        with evaluating(seg): masks,look = seg.queries(batch['images'], text)[1] > 0,seg.look(batch['images']) if hasattr(seg, 'look') else []
        for b,(r,m) in enumerate(zip(regions, masks)):
            r,m = r.flatten(1).float(),m.flatten(1).float()
            both = r @ m.T
            best,q = (both/(r.sum(1)[:, None] + m.sum(1) - both).clamp(min=1)).max(1)
            iou.append(best)
            if look: inside.append(torch.stack([(torch.nn.functional.interpolate(r.view(1, -1, *regions[b].shape[1:]), size=l['size'], mode='area')[0]*l['attn'][b, q]).sum((1, 2)) for l in look], 1))
        for l in look:
            if l['idx'] is not None:
                n,side = look[0]['size'][1],l['size'][1]//look[0]['size'][1]
                cells += [sorted({int(p)//l['size'][1]//side*n + int(p) % l['size'][1]//side for p in idx}) for idx in l['idx']]
    return dict(region_iou=torch.cat(iou).mean().item()) | (dict(inside=torch.cat(inside).mean(0).tolist(), cells=cells) if inside else {})

def pictures(seg, data, which=(0, 1)):
    "Fig. 5.4: for the largest thing of some images, the attention of the query that finds it, in the last three blocks."
    res = []
    for i in which:
        batch = collate([data[i]])
        regions,kinds = batch_regions(batch, len(data.vocabulary), batch['ignore'])
        things = [r for r,k in zip(regions[0], kinds[0]) if int(k) in data.things]
        r = max(things, key=lambda r: r.sum())
        with evaluating(seg): masks,look = seg.queries(batch['images'], seg.text(data.vocabulary))[1][0] > 0,seg.look(batch['images'])
        q = ((masks & r).sum((1, 2))/(masks | r).sum((1, 2))).argmax()
        res.append(dict(image=i, region=[[int(v) for v in row] for row in r[::2, ::2]], attention=[[[round(float(v), 4) for v in row] for row in l['attn'][0, q]] for l in look[-3:]]))
    return res

def run(name, seed, scale):
    framework,options,sparse,_ = ARMS[name]
    options = dict(options); freeze = options.pop('freeze', None)
    train,val = (ShapesWorld(s, scale['domain'], n=scale[s], size=scale['size'], seed=seed) for s in ('train', 'val'))
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn', output_stride=scale['output_stride'])
    seg = build(framework, clip, vocabulary=train.vocabulary, preset='small', seed=seed, **{**scale['head'], **scale[framework], **options})
    recipe = Recipe.tiny().replace(seed=seed, schedule='poly', **{k: scale[k] for k in ('iterations', 'batch_size', 'lr', 'backbone_lr')})
    mask,start = SparseMask.magnitude(seg.tower, scale['density']) if sparse else None,{}
    force = mask.apply(seg.backbone) if sparse else None
    if framework == 'faseg' and seg.head.decoder.n_levels == 4:
        with seeded(seed): start = dict(cells_at_start=measure(seg, val)['cells'])
    began = time.process_time()
    selection = analyze(seg.tower).select(freeze=freeze) if freeze else None
    history = finetune(seg, train, recipe, selection=selection, device='cpu')
    seconds = time.process_time()-began
    with seeded(seed): result,found = evaluate(seg, val),measure(seg, val) # random cells are drawn again at each look
    shown = dict(pictures=pictures(seg, val)) if seed == 0 and not sparse and name in ('FASeg', 'learned queries', 'anchor') else {}
    if force: force.remove()
    return dict(arm=name, seed=seed, miou=result['miou'], accuracy=result['pixel_accuracy'], first_loss=float(history.loss[:10].mean()), last_loss=float(history.loss[-10:].mean()),
                seconds=round(seconds, 1), head_params=sum(p.numel() for p in seg.head.parameters()), **found, **start, **shown)

def study(seeds, folder, scale=SCALE, arms=None):
    folder,res = Path(folder),[]
    folder.mkdir(parents=True, exist_ok=True)
    if (folder/'scale.json').exists() and load_json(folder/'scale.json') != scale: raise OpenTransError(f"'{folder}' holds a study of other sizes. Choose another folder, or remove it.")
    save_json(scale, folder/'scale.json')
    jobs = [(n, s) for main in (True, False) for s in range(seeds) for n,a in ARMS.items() if a[3] == main and (main or s < FEW) and (arms is None or n in arms)]
    for name,seed in jobs:
        kept = folder/f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        if not kept.exists(): save_json(run(name, seed, scale), kept)
        r = load_json(kept); res.append(r)
        print(f"{name}, seed {seed}: mIoU {100*r['miou']:.1f}, regions {100*r['region_iou']:.1f}, {r['seconds']:.0f} s", flush=True)
    return res

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=5); p.add_argument('--folder', default='runs/faseg'); p.add_argument('--out')
    p.add_argument('--iterations', type=int, default=SCALE['iterations']); p.add_argument('--arms', nargs='*', choices=ARMS)
    args = p.parse_args()
    torch.set_num_threads(1)
    scale = {**SCALE, 'iterations': args.iterations}
    results = study(args.seeds, args.folder, scale, args.arms)
    if args.out:
        save_json(dict(what='FASeg beside Mask2Former on ShapesWorld: toy scale',
                       run=dict(command=' '.join(['python benchmarks/study_faseg.py', f'--seeds {args.seeds}', *([f'--iterations {args.iterations}'] if args.iterations != SCALE['iterations'] else []), *(['--arms', *map(repr, args.arms)] if args.arms else [])]), date=date.today().isoformat(), cpu_minutes=round(sum(r['seconds'] for r in results)/60, 1), threads=1, **hardware()),
                       seeds=list(range(args.seeds)), scale=scale, results=results), args.out)
