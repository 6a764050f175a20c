"Mask2Former beside its two other implementations with the same weights, through training with a mask, and with files that are not what they should be."
import copy, os, pickle, types
import pytest
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
from opentrans.frameworks.queries import panoptic_from_queries, QueryHead, semantic_from_queries, SetLoss
from opentrans.frameworks.mask2former import head_names, load_mask2former
from opentrans.pruning import SparseMask

TINY = dict(hidden=64, mask_dim=32, queries=8, pixel_layers=1, layers=3, heads=2, pixel_ffn=32, ffn=32, points=128)
CHANNELS = dict(res2=24, res3=48, res4=96, res5=192)

def maps(channels, size, b=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(b, c, -(-size[0]//s), -(-size[1]//s), generator=g) for (k,c),s in zip(channels.items(), (4, 8, 16, 32))}

def truth(b, classes, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = [torch.randint(classes, (2+i,), generator=g) for i in range(b)]
    cells = [torch.randint(len(k), (size[0]//8, size[1]//8), generator=g).repeat_interleave(8, 0).repeat_interleave(8, 1) for k in labels]
    return [c == torch.arange(len(k))[:, None, None] for c,k in zip(cells, labels)],labels

# --- beside transformers

@pytest.fixture(scope='module')
def hugging():
    "transformers' whole model on maps that are given to it, with random weights that are not those of a beginning."
    swin = SwinConfig(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64, out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    torch.manual_seed(0)
    m = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=63, hidden_dim=64, feature_size=64, mask_feature_size=48, encoder_layers=2, decoder_layers=5, num_attention_heads=4,
                                                              encoder_feedforward_dim=96, dim_feedforward=80, num_queries=11, train_num_points=200))
    with torch.no_grad():
        for p in m.parameters(): p.add_(.05*torch.randn_like(p))
    class Given(torch.nn.Module):
        def forward(self, f): return BackboneOutput(feature_maps=tuple(f))
    m.model.pixel_level_module.encoder = Given()
    m.model.forward = types.MethodType(lambda self, pixel_values, **kw: self.transformer_module(*(lambda o: (o.decoder_hidden_states, o.decoder_last_hidden_state))(self.pixel_level_module(pixel_values)), output_hidden_states=True), m.model)
    return m.eval()

def test_head_is_transformers(hugging):
    "Every layer's queries, class logits and masks: 1e-5."
    head = QueryHead(CHANNELS, 64, 48, 11, 2, 4, 4, 96, 80).eval()
    weights = head_names(hugging.state_dict())
    head.load_state_dict({n: w for n,(_,w) in weights.items()})       # the class head fits as well: 63 classes and one more
    f = maps(CHANNELS, (96, 128), b=2)
    with torch.no_grad():
        theirs = hugging.model(list(f.values()))
        ours = head(f, every=True)
        classes = [hugging.class_predictor(q.transpose(0, 1)) for q in theirs.intermediate_hidden_states]
    assert len(ours) == 5
    for (c,m),tc,tm in zip(ours, classes, theirs.masks_queries_logits):
        assert (c - tc).abs().max() < 1e-5*tc.abs().max() and (m - tm).abs().max() < 1e-5*tm.abs().max()

def test_loss_is_transformers(hugging):
    "The same points are drawn from the same seed: every layer's losses are equal."
    f = maps(CHANNELS, (96, 128), b=3)
    with torch.no_grad(): out = hugging.model(list(f.values()))
    predictions = [(hugging.class_predictor(q.transpose(0, 1)).detach(), m.detach()) for q,m in zip(out.intermediate_hidden_states, out.masks_queries_logits)]
    regions,labels = truth(3, 63, (96, 128))
    crit = SetLoss(class_weight=2., points=200)
    for c,m in predictions:
        torch.manual_seed(1); theirs = hugging.criterion(m, c, [r.float() for r in regions], labels)
        torch.manual_seed(1); pairs = hugging.criterion.matcher(m, c, [r.float() for r in regions], labels)
        torch.manual_seed(1); ours,matched = crit([(c, m)], regions, labels)
        assert [[t.tolist() for t in p] for p in matched[0]] == [[t.tolist() for t in p] for p in pairs]
        for k,n,w in (('ce', 'loss_cross_entropy', 2.), ('mask', 'loss_mask', 5.), ('dice', 'loss_dice', 5.)): assert abs(ours[k] - w*theirs[n]) < 1e-4*abs(ours[k]) + 1e-6, (k, ours[k], theirs[n])

# --- beside the reference

@pytest.fixture(scope='module')
def reference(clone):
    "Modules of facebookresearch/Mask2Former, whose folder OPENTRANS_MASK2FORMER names; its compiled operator is replaced by its own PyTorch fallback."
    get = clone('OPENTRANS_MASK2FORMER', 'facebookresearch/Mask2Former')
    return types.SimpleNamespace(pixel=get('pixel_decoder.msdeformattn').MSDeformAttnPixelDecoder, decoder=get('transformer_decoder.mask2former_transformer_decoder').MultiScaleMaskedTransformerDecoder,
                                 criterion=get('criterion').SetCriterion, matcher=get('matcher').HungarianMatcher)

def reference_head(reference, channels, hidden=256, queries=100, pixel_layers=6, layers=9, heads=8, ffn=2048):
    from detectron2.layers import ShapeSpec
    shapes = {k: ShapeSpec(channels=c, stride=s) for (k,c),s in zip(channels.items(), (4, 8, 16, 32))}
    pixel = reference.pixel(shapes, transformer_dropout=0., transformer_nheads=heads, transformer_dim_feedforward=1024, transformer_enc_layers=pixel_layers, conv_dim=hidden, mask_dim=hidden, norm='GN',
                            transformer_in_features=['res3', 'res4', 'res5'], common_stride=4)
    masker = reference.decoder(hidden, True, num_classes=hidden-1, hidden_dim=hidden, num_queries=queries, nheads=heads, dim_feedforward=ffn, dec_layers=layers, pre_norm=False, mask_dim=hidden, enforce_input_project=False)
    return torch.nn.ModuleDict(dict(pixel_decoder=pixel, predictor=masker)).eval()

@pytest.mark.parametrize('moved', [0., .02])
def test_logits_are_the_references(reference, moved):
    "Full size on the maps of RN50, every layer's class and mask logits: 1e-4. With the weights of a beginning, and with weights that are not."
    torch.manual_seed(0)
    channels = dict(res2=256, res3=512, res4=1024, res5=2048)
    theirs = reference_head(reference, channels)
    with torch.no_grad():
        for p in theirs.parameters(): p.add_(moved*torch.randn_like(p)*p.std().nan_to_num(1.).clamp(min=.1))
    seg = build('mask2former', ClipBackbone.create('RN50', pretrained=None), ['thing', 'stuff'], kd=0.).eval()
    report = load_mask2former(seg, {f'sem_seg_head.{n}': p for n,p in theirs.state_dict().items()})
    assert (report.what == 'loaded').sum() == len(theirs.state_dict()), report[report.what == 'left']  # its 255 classes and one more fit the class embedding
    f = maps(channels, (256, 320))
    with torch.no_grad():
        fine,_,levels = theirs.pixel_decoder.forward_features(f)
        out = theirs.predictor(levels, fine)
        ours_fine,ours_levels = seg.head.pixel_decoder(f)
        ours = seg.head(f, every=True)
    assert (ours_fine - fine).abs().max() < 1e-4 and all((a - b).abs().max() < 1e-4 for a,b in zip(ours_levels, levels))
    every = out['aux_outputs'] + [out]
    assert len(every) == len(ours) == 10
    for (c,m),o in zip(ours, every): assert (c - o['pred_logits']).abs().max() < 1e-4 and (m - o['pred_masks']).abs().max() < 1e-4*max(1., o['pred_masks'].abs().max())

def test_loss_is_the_references(reference):
    f,k,size = 2,12,(96, 128)
    regions,labels = truth(f, k, size)
    torch.manual_seed(0)
    c,m = torch.randn(f, 20, k+1),4*torch.randn(f, 20, 24, 32)
    matcher = reference.matcher(cost_class=2., cost_mask=5., cost_dice=5., num_points=500)
    crit = reference.criterion(k, matcher=matcher, weight_dict={}, eos_coef=.1, losses=['labels', 'masks'], num_points=500, oversample_ratio=3., importance_sample_ratio=.75)
    torch.manual_seed(1); theirs = crit(dict(pred_logits=c, pred_masks=m), [dict(labels=l, masks=r) for l,r in zip(labels, regions)])
    torch.manual_seed(1); ours,_ = SetLoss(class_weight=2., points=500)([(c, m)], regions, labels)
    for n,t,w in (('ce', 'loss_ce', 2.), ('mask', 'loss_mask', 5.), ('dice', 'loss_dice', 5.)): assert abs(ours[n] - w*theirs[t]) < 1e-4*ours[n], (n, ours[n], w*theirs[t])

# --- through training

def test_contract_with_distillation_on_another_backbone():
    clip = ClipBackbone.create('shapes-rn', pretrained=None, output_stride=16)
    assert len(check_framework('mask2former', backbone=clip, preset='paper', **dict(TINY, kd_source='posterior', kd_target='attention'))) == 10

def test_one_mask_from_file_through_training(tmp_path):
    "Save, load, carry over, train in bfloat16, go on from a checkpoint, evaluate both kinds of output."
    world,clip = ShapesWorld(n=8, size=48),tiny_backbone()
    SparseMask.magnitude(clip.tower, .1).save(tmp_path/'mask.safetensors')
    mask = SparseMask.load(tmp_path/'mask.safetensors')
    recipe = Recipe.tiny().replace(iterations=3, batch_size=4, precision='bf16')
    def run(folder, *iterations):
        seg = build('mask2former', clip.fresh_copy(), vocabulary=world.vocabulary, preset='small', seed=0)
        with mask.apply(seg.backbone):
            finetune(seg, world, recipe, checkpoint_dir=folder, checkpoint_every=2)
            assert sum(int(w.count_nonzero()) for w in mask.weights(seg).values()) <= mask.kept
        return seg
    seg = run(tmp_path/'run')
    result = evaluate(seg, ShapesWorld('val', n=4, size=48), kind='panoptic')
    assert set(result['groups']) == {'base', 'novel'} and 0 <= result['miou'] <= 1 and 'pq' in result
    assert all(torch.equal(a, b) for a,b in zip(seg.state_dict().values(), run(tmp_path/'run').state_dict().values())), 'a finished run is not read back as it was'

def test_distillation_is_from_the_dense_clip():
    "The teacher is CLIP as it was loaded, whatever mask or training did to the backbone; it is no part of the model, and the loss reaches the queries of all layers."
    world = ShapesWorld(n=4, size=48)
    batch = collate([world[i] for i in range(4)])
    seg = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, seed=0, **TINY)
    regions = [r[r.flatten(1).sum(1) > 20][:2] for r in batch['regions']]
    before = seg.teach(batch['images'], regions)
    with torch.no_grad():
        for p in seg.backbone.parameters(): p.mul_(.5)
    names = set(seg.state_dict())
    after = copy.deepcopy(seg).teach(batch['images'], regions)
    assert all(torch.equal(a, b) for a,b in zip(before, after)) and [len(r) for r in after] == [len(r) for r in regions]
    assert names == set(seg.state_dict()) and not any('teacher' in n for n,_ in seg.named_parameters())
    torch.manual_seed(0); seg.loss(batch)['kd'].backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in seg.kd_proj) and seg.tower.conv1.weight.grad.abs().sum() > 0
    assert all(m[1].weight.grad is None for m in seg.embed), "the student 'prior' does not go through the classifier's projection"
    torch.manual_seed(0); half = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, seed=0, **dict(TINY, kd=1.)).loss(batch)['kd']
    torch.manual_seed(0); full = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, seed=0, **dict(TINY, kd=2.)).loss(batch)['kd']
    assert abs(full - 2*half) < 1e-4*full
    few = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, seed=0, **dict(TINY, kd_regions=1)).loss(batch)['kd'] # of one region there is one pair, and its distance to itself
    assert 0 < few <= 2*2*len(seg.kd_proj) + 1e-4
    with pytest.raises(OpenTransError, match="Unknown kd_source 'priror'.*Did you mean 'prior'"): build('mask2former', tiny_backbone(), kd_source='priror', **TINY)

def test_padding_is_of_the_mean_colour():
    "An image that is filled up to a multiple of 32 is segmented as the same image on a canvas of CLIP's mean colour."
    seg = build('mask2former', tiny_backbone(), vocabulary=['a', 'b'], preset='small', seed=0).eval()
    x = torch.rand(1, 3, 49, 75)
    canvas = seg.backbone.mean.expand(1, 3, 64, 96).clone(); canvas[..., :49, :75] = x
    with torch.no_grad(): assert (seg(x, seg.text()) - seg(canvas, seg.text())[..., :49, :75]).abs().max() < 1e-4

def test_cost_and_memory_run_without_numbers():
    seg = build('mask2former', tiny_backbone(), vocabulary=['a', 'b', 'c'], preset='small', seed=0)
    dense = cost(seg, (3, 64, 64)); sparse = dense.under(SparseMask.random(seg.tower, .1, seed=0))
    assert sparse.head.active_macs == dense.head.macs and sparse.tower.active_macs < .4*dense.tower.macs
    memory = training_memory(seg, (2, 3, 64, 64), optimizer='adamw')
    assert memory.peak > memory.weights + memory.optimizer
    with torch.no_grad(): assert seg.eval()(torch.rand(1, 3, 64, 64), seg.text()).isfinite().all(), 'a shape without numbers has stayed behind'

def test_panoptic_is_one_segment_a_pixel():
    "Against the rule, written out pixel by pixel; random queries."
    g = torch.Generator().manual_seed(3)
    c,m,isthing = 6*torch.randn(2, 12, 5, generator=g),9*torch.randn(2, 12, 4, 4, generator=g),[True, True, True, False]
    m = F.interpolate(m, (14, 18), mode='bilinear')
    out = panoptic_from_queries(c, m, isthing, score=.5, overlap=.3)
    for b in range(2):
        p,l = c[b].softmax(-1).max(-1)
        keep = [q for q in range(12) if l[q] != 4 and p[q] > .5]
        want,number = torch.tensor([255, 0]).repeat(14, 18, 1),0
        area = {q: int((m[b, q].sigmoid() >= .5).sum()) for q in keep}
        owner = [[max(keep, key=lambda q: (p[q]*m[b, q, y, x].sigmoid()).item()) for x in range(18)] for y in range(14)]
        for q in keep:
            mine = [(y, x) for y in range(14) for x in range(18) if owner[y][x] == q]
            here = [(y, x) for y,x in mine if m[b, q, y, x].sigmoid() >= .5]
            if not here or len(mine) < .3*area[q]: continue
            if isthing[l[q]]: number += 1
            for y,x in here: want[y, x] = torch.tensor([int(l[q]), number if isthing[l[q]] else 0])
        assert torch.equal(out[b], want)
    assert out[..., 1].max() >= 2
    assert torch.equal(semantic_from_queries(c, m).argmax(1), torch.einsum('bqk,bqhw->bkhw', c.softmax(-1)[..., :4], m.sigmoid()).argmax(1))

# --- files

def test_files_that_are_no_checkpoints(tmp_path):
    seg = build('mask2former', tiny_backbone(), preset='small', seed=0)
    torch.save(dict(model={f'sem_seg_head.{n}': p for n,p in torch.nn.Linear(2, 2).state_dict().items()}), tmp_path/'small.pth')
    with pytest.raises(OpenTransError, match=r'sem_seg_head.weight \(2, 2\).* are not in it'): load_mask2former(seg, tmp_path/'small.pth')
    (tmp_path/'cut.pkl').write_bytes(pickle.dumps(dict(model=dict(a=torch.zeros(3).numpy())))[:-20])
    with pytest.raises(OpenTransError, match='cannot be read as plain weights'): load_mask2former(seg, tmp_path/'cut.pkl')
    (tmp_path/'list.pkl').write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(OpenTransError, match='holds no state dict'): load_mask2former(seg, tmp_path/'list.pkl')
    (tmp_path/'code.pkl').write_bytes(pickle.dumps(dict(model=dict(a=os.system))))
    with pytest.raises(OpenTransError, match='which is no array'): load_mask2former(seg, tmp_path/'code.pkl')
    before = {n: t.clone() for n,t in seg.state_dict().items()}
    assert all(torch.equal(t, before[n]) for n,t in seg.state_dict().items())

def test_training_checkpoint_of_detectron2(tmp_path):
    "A `.pth` with optimizer and all, of other names beside."
    seg,other = (build('mask2former', tiny_backbone(seed=i), preset='small', seed=i, **({} if i else dict(kd=1.))) for i in (0, 1))
    hugging = {('model.pixel_level_module.decoder.' if n.startswith('pixel_decoder.') else 'model.transformer_module.')+n.split('.', 1)[1]: p for n,p in seg.head.state_dict().items() if not n.startswith('class_embed')}
    torch.save(dict(model=hugging | {'class_predictor.weight': torch.zeros(4, 64)}, optimizer=dict(state={}), iteration=7), tmp_path/'last.pth')
    report = load_mask2former(other, tmp_path/'last.pth')
    assert report.loc['class_predictor.weight', 'why'] == 'class head of a closed vocabulary'
    assert all(torch.equal(t, other.head.state_dict()[n]) for n,t in seg.head.state_dict().items() if not n.startswith('class_embed'))
