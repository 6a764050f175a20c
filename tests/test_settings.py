"One vocabulary of training settings: the same words in all trainers, and None for what is off."
import dataclasses
import pytest
import torch
from opentrans.data import ShapesWorld
from opentrans.data.batches import ImageBatches
from opentrans.distill import DistillTrainer, FeatureTrainer
from opentrans.errors import OpenTransError, none_if_off
from opentrans.experiments.scale import Scale
from opentrans.frameworks.contract import build, tiny_backbone
from opentrans.pruning import imp
from opentrans.training import Recipe, finetune
from opentrans.training.finetune import run_settings

WORDS = {'iterations', 'batch_size', 'lr', 'weight_decay', 'clip_grad', 'precision', 'crop', 'seed', 'workers'}
OLD_OFF = dict(crop=0, clip_grad=0., scale=[1., 1.], precision='no')

def world(): return ShapesWorld('train', n=4, size=32)

def test_trainers_say_the_same_words():
    def words(cls): return {f.name for f in dataclasses.fields(cls)}
    assert WORDS <= words(Recipe) and WORDS <= words(DistillTrainer)
    assert {'iterations', 'lr', 'clip_grad', 'precision'} <= words(FeatureTrainer)
    assert 'amp' not in words(DistillTrainer) | words(FeatureTrainer)

def test_none_is_off_whatever_files_say():
    off = Recipe(**dict.fromkeys(OLD_OFF))
    assert off == Recipe(**OLD_OFF) == Recipe.of(OLD_OFF) == Recipe.of({k: str(v) for k,v in OLD_OFF.items()
                                                                        if k not in ('scale', 'clip_grad')},
                                                                       base=off)
    assert [off.to_dict()[name] for name in OLD_OFF] == [None]*4
    assert Recipe.of(off.to_dict()) == off

@pytest.mark.parametrize('wrong', [dict(crop=False), dict(crop=1), dict(clip_grad=False), dict(clip_grad=-1),
                                   dict(precision=0), dict(scale=0), dict(iterations=None), dict(seed=None)])
def test_what_was_never_off_is_refused(wrong):
    with pytest.raises(OpenTransError): Recipe(**wrong)

def test_a_run_of_the_first_release_goes_on():
    "The settings in a run's file are in the words of opentrans 0.1, so that they are equal to those of then."
    seg = build('deeplabv3', tiny_backbone(), vocabulary=world().vocabulary, preset='small', width=16, seed=0)
    held = run_settings(seg, world(), Recipe(crop=None))
    assert {name: held[f'recipe.{name}'] for name in OLD_OFF} == OLD_OFF

def test_distillation_has_its_old_settings():
    clip = tiny_backbone()
    new = DistillTrainer(clip, world(), precision='bf16', crop=None, clip_grad=None)
    old = DistillTrainer(clip, world(), amp=True, crop=0, clip_grad=0)
    plain = DistillTrainer(clip, world(), precision='no')
    assert new.settings == old.settings and new.settings['amp'] is True and 'precision' not in new.settings
    assert (plain.precision, plain.settings['amp'], plain.settings['crop']) == (None, False, None)
    for wrong in (dict(precision='fp16'), dict(amp=1), dict(precision=True)):
        with pytest.raises(OpenTransError): DistillTrainer(clip, world(), **wrong)

def test_training_by_features_has_its_old_settings():
    images = ImageBatches(world(), 2, 2)
    new = FeatureTrainer(tiny_backbone(), images, precision='bf16')
    old = FeatureTrainer(tiny_backbone(), images, amp=True, clip_grad=0.)
    assert new.settings == old.settings and (new.settings['amp'], new.settings['clip_grad']) == (True, 0.)

def test_sizes_of_a_study_are_stored_as_before():
    stored = dict(val=0, imp_crop=0, checkpoint=0, precision='no')
    off = dataclasses.asdict(Scale(**dict.fromkeys(stored)))
    assert {name: off[name] for name in stored} == stored and off == dataclasses.asdict(Scale(**stored))

def test_intervals_may_be_none():
    data = world()
    seg = build('deeplabv3', tiny_backbone(), vocabulary=data.vocabulary, preset='small', width=16, seed=0)
    recipe = Recipe.tiny().replace(iterations=1, batch_size=2)
    for off in (None, 0): assert len(finetune(seg, data, recipe, eval_every=off, print_every=off)) == 1
    with pytest.raises(OpenTransError, match='print_every=-1'): finetune(seg, data, recipe, print_every=-1)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
    kept = [imp(net, lambda model, round: None, schedule=[.5], checkpoint_every=off)[0] for off in (None, 0)]
    assert kept[0] == kept[1]

def test_truth_values_are_no_word_for_off():
    assert none_if_off(False, 0) is False and none_if_off(0., 0) is None and none_if_off('no', 0) == 'no'
