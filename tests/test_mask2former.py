"Mask2Former beside its two other implementations with the same weights, through training, and from files."
import copy, os, pickle, re, types
import pytest
from conftest import reference_head
import torch
import torch.nn.functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.modeling_outputs import BackboneOutput
from opentrans.clip import ClipBackbone
from opentrans.errors import OpenTransError
from opentrans.cost import cost, training_memory
from opentrans.data import ShapesWorld, collate
from opentrans.training import evaluate, finetune, Recipe
from opentrans.frameworks import build, check_framework
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.queries import HeadSizes, panoptic_from_queries, QueryHead, semantic_from_queries, SetLoss
from opentrans.frameworks.mask2former import load_mask2former
from opentrans.frameworks.published import head_names
from opentrans.pruning import SparseMask

TINY = dict(hidden=64, mask_dim=32, queries=8, pixel_layers=1, layers=3, heads=2, pixel_ffn=32, ffn=32, points=128)
CHANNELS = dict(res2=24, res3=48, res4=96, res5=192)
STRIDES = (4, 8, 16, 32)

def maps(channels, size, batch=1, seed=0):
    "Random maps of a backbone for images of a size."
    generator,res = torch.Generator().manual_seed(seed),{}
    for (name,count),stride in zip(channels.items(), STRIDES):
        height,width = (-(-side//stride) for side in size)
        res[name] = torch.randn(batch, count, height, width, generator=generator)
    return res

def truth(batch, classes, size, seed=0):
    "Regions of cells of 8x8 pixels, and their classes, for each image."
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(classes, (2+i,), generator=generator) for i in range(batch)]
    regions = []
    for kinds in labels:
        cells = torch.randint(len(kinds), (size[0]//8, size[1]//8), generator=generator)
        segments = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)
        regions.append(segments == torch.arange(len(kinds))[:, None, None])
    return regions,labels

def near(ours, theirs, share=1e-4, least=0.):
    "Is the largest difference below a share of the largest value, or of `least` if that is larger?"
    return (ours - theirs).abs().max() < share*max(least, theirs.abs().max())

# --- beside transformers

class Given(torch.nn.Module):
    "A backbone whose maps are what it is given."
    def forward(self, features): return BackboneOutput(feature_maps=tuple(features))

def _hugging_forward(self, pixel_values, **kwargs):
    "The whole model on maps instead of pixels."
    pixels = self.pixel_level_module(pixel_values)
    read = pixels.decoder_hidden_states, pixels.decoder_last_hidden_state
    return self.transformer_module(*read, output_hidden_states=True)

@pytest.fixture(scope='module')
def hugging():
    "transformers' whole model on maps that are given to it, with random weights that are not those of a beginning."
    stages = [f'stage{i}' for i in (1, 2, 3, 4)]
    swin = SwinConfig(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64,
                      out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=63, hidden_dim=64, feature_size=64, mask_feature_size=48, encoder_layers=2,
        decoder_layers=5, num_attention_heads=4, encoder_feedforward_dim=96, dim_feedforward=80, num_queries=11,
        train_num_points=200)
    torch.manual_seed(0)
    whole = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in whole.parameters(): parameter.add_(.05*torch.randn_like(parameter))
    whole.model.pixel_level_module.encoder = Given()
    whole.model.forward = types.MethodType(_hugging_forward, whole.model)
    return whole.eval()

def test_head_is_transformers(hugging):
    "Every layer's queries, class logits and masks: 1e-5."
    sizes = HeadSizes(hidden=64, mask_dim=48, queries=11, pixel_layers=2, layers=4, heads=4, pixel_ffn=96, ffn=80)
    head = QueryHead(CHANNELS, sizes).eval()
    weights = head_names(hugging.state_dict())
    head.load_state_dict({name: tensor for name,(_,tensor) in weights.items()}) # with 63 classes and one more
    features = maps(CHANNELS, (96, 128), batch=2)
    with torch.no_grad():
        theirs = hugging.model(list(features.values()))
        ours = head(features, every=True)
        classes = [hugging.class_predictor(q.transpose(0, 1)) for q in theirs.intermediate_hidden_states]
    assert len(ours) == 5
    for (our_classes,our_masks),their_classes,their_masks in zip(ours, classes, theirs.masks_queries_logits):
        assert near(our_classes, their_classes, 1e-5) and near(our_masks, their_masks, 1e-5)

def test_loss_is_transformers(hugging):
    "The same points are drawn from the same seed: every layer's losses are equal."
    features = maps(CHANNELS, (96, 128), batch=3)
    with torch.no_grad():
        out = hugging.model(list(features.values()))
        classes = [hugging.class_predictor(q.transpose(0, 1)) for q in out.intermediate_hidden_states]
    regions,labels = truth(3, 63, (96, 128))
    as_numbers = [masks.float() for masks in regions]
    criterion = SetLoss(class_weight=2., points=200)
    for class_logits,mask_logits in zip(classes, out.masks_queries_logits):
        torch.manual_seed(1)
        theirs = hugging.criterion(mask_logits, class_logits, as_numbers, labels)
        torch.manual_seed(1)
        pairs = hugging.criterion.matcher(mask_logits, class_logits, as_numbers, labels)
        torch.manual_seed(1)
        ours,matched = criterion([(class_logits, mask_logits)], regions, labels)
        assert [[t.tolist() for t in pair] for pair in matched[0]] == [[t.tolist() for t in pair] for pair in pairs]
        for name,their_name,weight in (('ce', 'loss_cross_entropy', 2.), ('mask', 'loss_mask', 5.),
                                       ('dice', 'loss_dice', 5.)):
            expected = weight*theirs[their_name]
            assert abs(ours[name] - expected) < 1e-4*abs(ours[name]) + 1e-6, (name, ours[name], expected)

# --- beside the reference

@pytest.fixture(scope='module')
def reference(clone):
    "Modules of facebookresearch/Mask2Former in the folder OPENTRANS_MASK2FORMER, with its own PyTorch fallback."
    get = clone('OPENTRANS_MASK2FORMER', 'facebookresearch/Mask2Former')
    decoder = get('transformer_decoder.mask2former_transformer_decoder').MultiScaleMaskedTransformerDecoder
    return types.SimpleNamespace(pixel=get('pixel_decoder.msdeformattn').MSDeformAttnPixelDecoder, decoder=decoder,
                                 criterion=get('criterion').SetCriterion, matcher=get('matcher').HungarianMatcher)

@pytest.mark.parametrize('moved', [0., .02])
def test_logits_are_the_references(reference, moved):
    "Full size on the maps of RN50, every layer's class and mask logits: 1e-4. With initial weights and others."
    torch.manual_seed(0)
    channels = dict(res2=256, res3=512, res4=1024, res5=2048)
    theirs = reference_head(reference, channels, 9)
    with torch.no_grad():
        for p in theirs.parameters(): p.add_(moved*torch.randn_like(p)*p.std().nan_to_num(1.).clamp(min=.1))
    seg = build('mask2former', ClipBackbone.create('RN50', pretrained=None), ['thing', 'stuff'], kd=0.).eval()
    report = load_mask2former(seg, {f'sem_seg_head.{name}': p for name,p in theirs.state_dict().items()})
    # its 255 classes and one more fit the class embedding
    assert (report.what == 'loaded').sum() == len(theirs.state_dict()), report[report.what == 'left']
    features = maps(channels, (256, 320))
    with torch.no_grad():
        fine,_,levels = theirs.pixel_decoder.forward_features(features)
        out = theirs.predictor(levels, fine)
        ours_fine,ours_levels = seg.head.pixel_decoder(features)
        ours = seg.head(features, every=True)
    for our_map,their_map in zip((ours_fine, *ours_levels), (fine, *levels)):
        assert (our_map - their_map).abs().max() < 1e-4
    every = out['aux_outputs'] + [out]
    assert len(every) == len(ours) == 10
    for (classes,masks),layer in zip(ours, every):
        assert (classes - layer['pred_logits']).abs().max() < 1e-4 and near(masks, layer['pred_masks'], least=1.)

def test_loss_is_the_references(reference):
    count = 2
    classes = 12
    size = (96, 128)
    regions,labels = truth(count, classes, size)
    torch.manual_seed(0)
    class_logits,mask_logits = torch.randn(count, 20, classes+1),4*torch.randn(count, 20, 24, 32)
    matcher = reference.matcher(cost_class=2., cost_mask=5., cost_dice=5., num_points=500)
    criterion = reference.criterion(
        classes, matcher=matcher, weight_dict={}, eos_coef=.1, losses=['labels', 'masks'], num_points=500,
        oversample_ratio=3., importance_sample_ratio=.75)
    targets = [dict(labels=kinds, masks=masks) for kinds,masks in zip(labels, regions)]
    torch.manual_seed(1)
    theirs = criterion(dict(pred_logits=class_logits, pred_masks=mask_logits), targets)
    torch.manual_seed(1)
    ours,_ = SetLoss(class_weight=2., points=500)([(class_logits, mask_logits)], regions, labels)
    for name,their_name,weight in (('ce', 'loss_ce', 2.), ('mask', 'loss_mask', 5.), ('dice', 'loss_dice', 5.)):
        expected = weight*theirs[their_name]
        assert abs(ours[name] - expected) < 1e-4*ours[name], (name, ours[name], expected)

# --- through training

def test_contract_with_distillation_on_another_backbone():
    clip = ClipBackbone.create('shapes-rn', pretrained=None, output_stride=16)
    options = dict(TINY, kd_source='posterior', kd_target='attention')
    assert len(check_framework('mask2former', backbone=clip, preset='paper', **options)) == 10

def test_one_mask_from_file_through_training(tmp_path):
    "Save, load, carry over, train in bfloat16, go on from a checkpoint, evaluate both kinds of output."
    world,clip = ShapesWorld(n=8, size=48),tiny_backbone()
    SparseMask.magnitude(clip.tower, .1).save(tmp_path/'mask.safetensors')
    mask = SparseMask.load(tmp_path/'mask.safetensors')
    recipe = Recipe.tiny().replace(iterations=3, batch_size=4, precision='bf16')
    def run(folder):
        seg = build('mask2former', clip.fresh_copy(), vocabulary=world.vocabulary, preset='small', seed=0)
        with mask.apply(seg.backbone):
            finetune(seg, world, recipe, checkpoint_dir=folder, checkpoint_every=2)
            assert sum(int(w.count_nonzero()) for w in mask.weights(seg).values()) <= mask.kept
        return seg
    seg = run(tmp_path/'run')
    result = evaluate(seg, ShapesWorld('val', n=4, size=48), kind='panoptic')
    assert set(result['groups']) == {'base', 'novel'} and 0 <= result['miou'] <= 1 and 'pq' in result
    again = run(tmp_path/'run').state_dict()
    same = [torch.equal(tensor, again[name]) for name,tensor in seg.state_dict().items()]
    assert all(same), 'a finished run is not read back as it was'

@pytest.fixture(scope='module')
def shapes(): # four scenes
    world = ShapesWorld(n=4, size=48)
    return world.vocabulary,collate([world[i] for i in range(4)])

def test_distillation_is_from_the_dense_clip(shapes):
    "The teacher is CLIP as it was loaded, whatever mask or training did to the backbone, and no part of the model."
    vocabulary,batch = shapes
    seg = build('mask2former', tiny_backbone(), vocabulary=vocabulary, seed=0, **TINY)
    regions = [masks[masks.flatten(1).sum(1) > 20][:2] for masks in batch['regions']]
    before = seg.teach(batch['images'], regions)
    with torch.no_grad():
        for parameter in seg.backbone.parameters(): parameter.mul_(.5)
    names = set(seg.state_dict())
    after = copy.deepcopy(seg).teach(batch['images'], regions)
    assert all(torch.equal(a, b) for a,b in zip(before, after))
    assert [len(seen) for seen in after] == [len(masks) for masks in regions]
    assert names == set(seg.state_dict()) and not any('teacher' in name for name,_ in seg.named_parameters())

def test_distillation_reaches_the_queries_of_all_layers(shapes):
    vocabulary,batch = shapes
    seg = build('mask2former', tiny_backbone(), vocabulary=vocabulary, seed=0, **TINY)
    torch.manual_seed(0)
    seg.loss(batch)['kd'].backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in seg.kd_proj) and seg.tower.conv1.weight.grad.abs().sum() > 0
    others = [m[1].weight.grad for m in seg.embed]
    assert others == [None]*len(others), "the student 'prior' does not go through the classifier's projection"

def test_weight_and_number_of_distilled_regions(shapes):
    "Twice the weight is twice the loss; and of one region there is one pair, and its distance to itself."
    vocabulary,batch = shapes
    def loss(**options):
        seg = build('mask2former', tiny_backbone(), vocabulary=vocabulary, seed=0, **dict(TINY, **options))
        torch.manual_seed(0)
        return seg.loss(batch)['kd'],len(seg.kd_proj)
    half,full = loss(kd=1.)[0],loss(kd=2.)[0]
    assert abs(full - 2*half) < 1e-4*full
    few,layers = loss(kd_regions=1)
    assert 0 < few <= 2*2*layers + 1e-4
    said = "Unknown kd_source 'priror'.*Did you mean 'prior'"
    with pytest.raises(OpenTransError, match=said): loss(kd_source='priror')

def test_padding_is_of_the_mean_colour():
    "An image that is filled up to a multiple of 32 is segmented as the same on a canvas of CLIP's mean colour."
    seg = build('mask2former', tiny_backbone(), vocabulary=['a', 'b'], preset='small', seed=0).eval()
    x = torch.rand(1, 3, 49, 75)
    canvas = seg.backbone.mean.expand(1, 3, 64, 96).clone()
    canvas[..., :49, :75] = x
    with torch.no_grad(): padded,painted = seg(x, seg.text()),seg(canvas, seg.text())[..., :49, :75]
    assert (padded - painted).abs().max() < 1e-4

def test_cost_and_memory_run_without_numbers():
    seg = build('mask2former', tiny_backbone(), vocabulary=['a', 'b', 'c'], preset='small', seed=0)
    dense = cost(seg, (3, 64, 64))
    sparse = dense.with_mask(SparseMask.random(seg.tower, .1, seed=0))
    assert sparse.head.active_macs == dense.head.macs and sparse.tower.active_macs < .4*dense.tower.macs
    memory = training_memory(seg, (2, 3, 64, 64), optimizer='adamw')
    assert memory.peak > memory.weights + memory.optimizer
    with torch.no_grad(): scores = seg.eval()(torch.rand(1, 3, 64, 64), seg.text())
    assert scores.isfinite().all(), 'a shape without numbers has stayed behind'

def segments_by_hand(class_logits, mask_logits, isthing, score, overlap):
    "The segments of one image (H,W,2) by the rule, written out pixel by pixel."
    height,width = mask_logits.shape[1:]
    sureness,label = class_logits.softmax(-1).max(-1)
    used = [q for q in range(len(label)) if label[q] != len(isthing) and sureness[q] > score]
    shares = mask_logits.sigmoid()
    owner = {}
    for y in range(height):
        for x in range(width): owner[y, x] = max(used, key=lambda q: (sureness[q]*shares[q, y, x]).item())
    segments,number = torch.tensor([255, 0]).repeat(height, width, 1),0
    for q in used:
        owned = [pixel for pixel,query in owner.items() if query == q]
        kept = [(y, x) for y,x in owned if shares[q, y, x] >= .5]
        if not kept or len(owned) < overlap*int((shares[q] >= .5).sum()): continue
        thing = isthing[label[q]]
        number += thing
        for y,x in kept: segments[y, x] = torch.tensor([int(label[q]), number if thing else 0])
    return segments

def test_panoptic_is_one_segment_a_pixel():
    "Against the rule, written out pixel by pixel; random queries."
    generator,isthing = torch.Generator().manual_seed(3),[True, True, True, False]
    class_logits = 6*torch.randn(2, 12, 5, generator=generator)
    mask_logits = F.interpolate(9*torch.randn(2, 12, 4, 4, generator=generator), (14, 18), mode='bilinear')
    out = panoptic_from_queries(class_logits, mask_logits, isthing, score=.5, overlap=.3)
    for image in range(2):
        assert torch.equal(out[image], segments_by_hand(class_logits[image], mask_logits[image], isthing, .5, .3))
    assert out[..., 1].max() >= 2
    summed = torch.einsum('bqk,bqhw->bkhw', class_logits.softmax(-1)[..., :4], mask_logits.sigmoid())
    assert torch.equal(semantic_from_queries(class_logits, mask_logits).argmax(1), summed.argmax(1))

# --- files

MASKER = dict([
    ('queries_features', 'query_feat'), ('queries_embedder', 'query_embed'), ('decoder.layernorm', 'decoder_norm')])
LAYER = dict(
    self_attn='self_attention_layers.{}.self_attn', self_attn_layer_norm='self_attention_layers.{}.norm',
    cross_attn='cross_attention_layers.{}.multihead_attn', cross_attn_layer_norm='cross_attention_layers.{}.norm',
    fc1='ffn_layers.{}.linear1', fc2='ffn_layers.{}.linear2', final_layer_norm='ffn_layers.{}.norm')
PIXEL = dict([
    ('input_projections', 'input_proj'), ('mask_projection', 'mask_features'),
    ('.encoder.', '.transformer.encoder.'), ('.level_embed', '.transformer.level_embed'),
    ('self_attn_layer_norm', 'norm1'), ('final_layer_norm', 'norm2'),
    ('.fc', '.linear'), ('adapter_1.0', 'adapter_1'), ('adapter_1.1', 'adapter_1.norm'),
    ('layer_1.0', 'layer_1'), ('layer_1.1', 'layer_1.norm')])
MASK_MLP = re.compile(r'decoder\.mask_predictor\.mask_embedder\.(\d)\.0')

def detectron2_names(head):
    "A head's weights in the reference's names, written out by hand."
    res,state = {},head.state_dict()
    for name,tensor in state.items():
        part,rest = name.split('.', 1)
        layer = re.match(r'decoder\.layers\.(\d+)\.(\w+)\.(.*)', rest)
        if part == 'class_embed': new = f'predictor.{name}'
        elif part == 'pixel_decoder':
            new = name
            for ours,theirs in PIXEL.items(): new = new.replace(ours, theirs)
        elif layer is None:
            new = 'predictor.' + MASK_MLP.sub(r'mask_embed.layers.\1', rest)
            for ours,theirs in MASKER.items(): new = new.replace(ours, theirs)
        else:
            number,module,end = layer.groups()
            if end.startswith(('k_proj', 'v_proj')): continue # packed with q
            if end.startswith('q_proj'):
                tensor = torch.cat([state[name.replace('q_proj', f'{letter}_proj')] for letter in 'qkv'])
                end = end.replace('q_proj.', 'in_proj_')
            new = f'predictor.transformer_{LAYER[module].format(number)}.{end}'
        res[f'sem_seg_head.{new}'] = tensor
    return res

def test_files_of_detectron2():
    "The reference's names, those of its first version, and a head of a closed vocabulary beside."
    ours,other = (build('mask2former', tiny_backbone(seed=i), seed=i, **TINY).eval() for i in (1, 2))
    file = detectron2_names(ours.head)
    examples = ('pixel_decoder.adapter_1.norm.weight', 'pixel_decoder.transformer.level_embed',
                'pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.bias',
                'predictor.transformer_ffn_layers.1.linear2.weight', 'predictor.query_feat.weight',
                'predictor.mask_embed.layers.2.bias')
    assert {f'sem_seg_head.{name}' for name in examples} <= file.keys()
    state,back = ours.head.state_dict(),head_names(file)
    assert back.keys() == state.keys() and all(torch.equal(tensor, state[name]) for name,(_,tensor) in back.items())
    first = [name.replace('head.pixel_decoder.', 'head.').replace('query_feat', 'static_query') for name in file]
    assert head_names(dict(zip(first, file.values()))).keys() == back.keys()
    weight,bias = (f'sem_seg_head.predictor.class_embed.{name}' for name in ('weight', 'bias'))
    closed = {weight: torch.zeros(134, 64), bias: torch.zeros(134)}
    table = load_mask2former(other, file | closed | {'backbone.stem.conv1.weight': torch.zeros(8, 3, 7, 7)})
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(ours.head(ours.features(x))[1], other.head(ours.features(x))[1])
    reasons = dict.fromkeys(closed, 'class head of a closed vocabulary')
    assert table[table.what == 'left'].why.to_dict() == reasons | {'backbone.stem.conv1.weight': 'another backbone'}

def test_files_that_are_no_checkpoints(tmp_path):
    seg = build('mask2former', tiny_backbone(), preset='small', seed=0)
    before = {name: tensor.clone() for name,tensor in seg.state_dict().items()}
    small = {f'sem_seg_head.{name}': p for name,p in torch.nn.Linear(2, 2).state_dict().items()}
    torch.save(dict(model=small), tmp_path/'small.pth')
    (tmp_path/'cut.pkl').write_bytes(pickle.dumps(dict(model=dict(a=torch.zeros(3).numpy())))[:-20])
    (tmp_path/'list.pkl').write_bytes(pickle.dumps([1, 2]))
    (tmp_path/'code.pkl').write_bytes(pickle.dumps(dict(model=dict(a=os.system))))
    errors = {'small.pth': r'sem_seg_head.weight \(2, 2\).* are not in it', 'code.pkl': 'which is no array',
              'cut.pkl': 'cannot be read as plain weights', 'list.pkl': 'holds no state dict'}
    for name,said in errors.items():
        with pytest.raises(OpenTransError, match=said): load_mask2former(seg, tmp_path/name)
    assert all(torch.equal(tensor, before[name]) for name,tensor in seg.state_dict().items())

def test_training_checkpoint_of_detectron2(tmp_path):
    "A `.pth` with optimizer and all, of Hugging Face's names beside."
    seg = build('mask2former', tiny_backbone(seed=0), preset='small', seed=0, kd=1.)
    other = build('mask2former', tiny_backbone(seed=1), preset='small', seed=1)
    parts = dict(pixel_decoder='model.pixel_level_module.decoder', decoder='model.transformer_module')
    state = {name: tensor for name,tensor in seg.head.state_dict().items() if not name.startswith('class_embed')}
    hugging = {f"{parts[name.split('.')[0]]}.{name.split('.', 1)[1]}": tensor for name,tensor in state.items()}
    model = hugging | {'class_predictor.weight': torch.zeros(4, 64)}
    torch.save(dict(model=model, optimizer=dict(state={}), iteration=7), tmp_path/'last.pth')
    report = load_mask2former(other, tmp_path/'last.pth')
    assert report.loc['class_predictor.weight', 'why'] == 'class head of a closed vocabulary'
    assert all(torch.equal(tensor, other.head.state_dict()[name]) for name,tensor in state.items())
