"""Faults planted into the package, and the tests that notice them: whether the tests are a net.

    python tests/mutations.py               # all of them, and tests/mutations.csv anew
    python tests/mutations.py -k lock       # those with the word in their name or file; the other rows stay

Each fault is applied to a copy of the checkout in a temporary folder, where the tests named beside it run. The same
tests run there without any fault first, and have to pass.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_suffix('.csv')
COPIED = ('timm_reparam', 'model_cards', 'tests', 'train.py', 'pyproject.toml')


class Mutation(NamedTuple):
    """A fault.

    `new` takes the place of `old`, which stands once in `file`, relative to timm_reparam/. `tests`, relative to tests/,
    are to notice it; ``::name`` is one more test of the file before it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def path(self) -> str:
        """The file, relative to the checkout."""
        return self.file if self.file == 'train.py' else f'timm_reparam/{self.file}'

    @property
    def selection(self) -> list[str]:
        """The tests, as pytest names them."""
        found: list[str] = []
        for test in self.tests.split():
            found.append(found[-1].partition('::')[0] + test if test.startswith('::') else f'tests/{test}')
        return found


# fmt: off
MUTATIONS = [Mutation(*fields) for fields in (
    # layers
    ('the gradient of scaled branches has eps outside the root', 'layers/_branches.py',
     'inverses = torch.rsqrt(variances + ctx.eps)', 'inverses = 1 / (variances.sqrt() + ctx.eps)',
     'layers/test_ac_conv.py::test_branches_are_added_as_torch_adds_them'),
    ('running variances are those without the correction of the sample', 'layers/_branches.py',
     'unbiasing = count / max(count - 1, 1)', 'unbiasing = 1.0',
     'layers/test_ac_conv.py::test_running_variance_is_kept_as_batch_norm_keeps_it'),
    ('kernels of branches are added into the stock weight itself', 'layers/_branches.py', 'total = kernel.clone()',
     'total = kernel', 'layers/test_ac_conv.py::test_kernels_of_any_size_are_added_on_the_middle'),
    ('the variance over processes leaves out how their means differ', 'layers/_branches.py',
     '(counts * (all_variances + (all_means - means).square()))', '(counts * all_variances)',
     'test_weight_averaging.py::test_synchronised_branches_see_one_batch'),
    ('branches without gammas stay open when stock weights are loaded', 'layers/_branched_conv.py',
     'for gate in self._gammas() or self._branch_weights():', 'for gate in self._gammas():',
     'layers/test_common.py::test_stock_state_dict_is_taken_as_a_lift'),
    ('the cumulative average of update_bn counts one batch too many', 'layers/_branch_norm.py',
     'return 1 / self._batches', 'return 1 / (self._batches + 1)',
     'test_weight_averaging.py::test_update_bn_gives_the_branches_the_statistics_of_the_data'),
    ('the mean of DBB is over the squared height of the window', 'layers/dbb_conv.py', '1 / (size[0] * size[1])',
     '1 / (size[0] * size[0])', 'layers/test_dbb_conv.py::test_formula'),
    ('the border of the DBB block has the sign of the mean wrong', 'layers/dbb_block.py',
     'norm.bias.detach() - norm.running_mean', 'norm.bias.detach() + norm.running_mean',
     'layers/test_dbb_conv.py::test_block_formula'),
    ('the factors of OREPA start in another order', 'layers/orepa_conv.py', '[0.25, 0.0, 1.0, 0.5, 0.5]',
     '[0.25, 0.0, 0.5, 1.0, 0.5]', 'layers/test_orepa_conv.py::test_starts'),
    ('the frequencies along the width do not start again in the middle', 'layers/orepa_conv.py',
     'torch.cos(width * (frequencies - channels / 2))', 'torch.cos(width * frequencies)',
     'layers/test_orepa_conv.py::test_prior'),
    ('the running variances of the two ACNet branches are exchanged', 'layers/ac_conv.py',
     'return [self.vertical_running_var, self.horizontal_running_var]',
     'return [self.horizontal_running_var, self.vertical_running_var]', 'layers/test_ac_conv.py::test_formula_in_eval'),
    ('the first further identity block of DO-Conv is left out', 'layers/do_conv.py', 'for block in range(surplus',
     'for block in range(1, surplus', 'layers/test_do_conv.py::test_formula'),
    ('the map of RefConv takes the first kernel of a group alone', 'layers/ref_conv.py',
     'if self.groups == 1 and (base.dtype == torch.float64 or map_h * map_w == 1):',
     'if base.dtype == torch.float64 or map_h * map_w == 1:', 'layers/test_ref_conv.py::test_formula'),
    ('the form for inference has the temperature of the start', 'layers/dynamic_conv.py',
     'value = value / source.current_temperature()', 'value = value / (source.temperature or 1)',
     'layers/test_dynamic_conv.py::test_inference_form'),
    ('a repeated pass has the temperature of the next one', 'layers/_temperature.py',
     'temperature = _temperature(position - 1 + pending, steps, start)',
     'temperature = _temperature(position, steps, start)',
     'layers/test_dynamic_conv.py::test_checkpointing_repeats_the_pass_with_its_own_temperature'),
    ('the fused kernel is composed in the dtype of the layer', 'layers/_base.py', 'exact = float64_copy(self).eval()',
     'exact = self', 'layers/test_common.py::test_fused_kernel_is_rounded_once'),
    # formats
    ('the last norm of an official ACNet block does not reach the gammas', 'formats/ac_conv.py', '= gain * norm.weight',
     '= norm.weight', 'test_importers.py::test_asymmetric_block'),
    ('a trained identity of official DO-Conv is dropped', 'formats/do_conv.py', 'depthwise + (identity - eye)',
     'depthwise', 'test_importers.py::test_doconv_whose_stored_identity_was_trained_too'),
    ('imported dynamic convolutions start their temperature again', 'formats/dynamic_conv.py',
     'temperature_position=steps.clone()', 'temperature_position=torch.zeros_like(steps)',
     'test_importers.py::test_stacked_kernels'),
    # conversion, fusion, verification
    ('a model records the given options of its layers without the defaults', 'convert.py',
     'options = {**VARIANTS[variant].layer.default_options(), **options}', 'options = dict(options)',
     'hub/test_checkpoint.py::test_pair_loads_as_saved'),
    ('a convolution of four channels is no stem', 'convert.py', 'first.in_channels <= _IMAGE_CHANNELS',
     'first.in_channels < _IMAGE_CHANNELS', 'test_convert.py::test_only_a_convolution_of_images_can_be_a_stem'),
    ('hooks of fused layers are lost', 'fuse.py', 'copy.deepcopy({**kept, **layer.added_attributes()}, copied)',
     'copy.deepcopy(layer.added_attributes(), copied)', 'test_convert.py::test_hooks_of_the_layers_come_along'),
    ('a norm is folded into a convolution that something else reads', 'fold.py', 'and len(conv_node.users) == 1', '',
     'test_fold.py::test_what_can_be_folded_is_and_nothing_else'),
    ('the bias of a folded convolution is not scaled', 'fold.py', 'to_float64(conv.bias) * scale + shift',
     'to_float64(conv.bias) + shift',
     'test_fold.py::test_folding_is_exact ::test_what_can_be_folded_is_and_nothing_else'),
    ('another number of input channels takes every layer for a stock one', 'lift.py',
     "lifted = {key for key in added if key.startswith(f'{name}.')}", 'lifted = added',
     'test_pretrained.py::test_train_time_checkpoint_with_other_input_channels'),
    ('a verification passes over what differs beside the layers', '_reports.py',
     'return outputs and not self.problems and not self.layers_off', 'return outputs and not self.layers_off',
     'test_faults.py::test_a_planted_fault_is_found'),
    ('a tensor changed in place counts as the output of its convolution', 'verify.py',
     'reference() is x and x._version == version', 'reference() is x',
     'test_verify.py::test_a_norm_takes_the_output_of_its_convolution_alone'),
    ('a layer passes whatever its taps are', '_reports.py', 'shares = (self.kernel, self.algebra / ALGEBRA_BOUND',
     'shares = (self.algebra / ALGEBRA_BOUND', 'test_faults.py::test_a_planted_fault_is_found'),
    ('the eps of two norms is not compared', '_compare.py', "for key in ('eps', 'momentum'):",
     "for key in ('momentum',):", 'test_faults.py::test_a_planted_fault_is_found'),
    ('the constant of an official block goes into the norm with the wrong sign', 'importers.py',
     "state[f'{norm_name}.running_mean'] - constant", "state[f'{norm_name}.running_mean'] + constant",
     'test_importers.py::test_asymmetric_block ::test_orepa'),
    # the Hub
    ('files of a checkpoint are not flushed', 'hub/atomic.py',
     'flush(*_partial(draft.target).iterdir(), _partial(draft.target))', 'flush(_partial(draft.target))',
     'test_files.py'),
    ('two saves share the lock', 'hub/atomic.py', 'fcntl.LOCK_EX', 'fcntl.LOCK_SH',
     'hub/test_checkpoint.py::test_looks_only_when_no_other_save_is_at_work'),
    ('a folder that a killed save had set aside is removed', 'hub/atomic.py', '            _bring_back(draft.target)\n',
     '            pass\n', 'hub/test_checkpoint.py::test_leftovers_of_a_killed_save'),
    ('forms of two saves are taken for a pair', 'hub/gate.py', '            _check_sibling(one, other, found)',
     '            pass', 'hub/test_checkpoint.py::test_verify_finds_a_half_that_was_replaced'),
    ('the licence of a configuration is not compared', 'hub/gate.py',
     "compare(f'{one.name}/{CONFIG_NAME}: pretrained_cfg.license', stated_license(known), license)", 'pass',
     'hub/test_gate_faults.py::test_a_fault_of_the_files_is_found'),
    ("a commit of somebody else's is overwritten", 'hub/client.py', ', parent_commit=base.head', '',
     'hub/test_publish.py::test_concurrent_commit_is_a_conflict'),
    ('addresses show their passwords in messages', 'hub/client.py', r'|(?<=://)[^/\s@]+(?=@)', '',
     'hub/test_pull.py::test_secrets_of_the_machine_are_in_no_message'),
    ('a pair that is not verified is published', 'hub/push.py',
     'verify_pair(*(form.folder for form in forms)).raise_for_problems()',
     'verify_pair(*(form.folder for form in forms))', 'hub/test_publish.py::test_unfit_pairs'),
    ('a pair that is not verified is pulled', 'hub/fetch.py',
     "if not report.passed:\n            raise ReparamError(f'{repo_ids[0]}: is not verified",
     "if report.fusion is None:\n            raise ReparamError(f'{repo_ids[0]}: is not verified",
     'hub/test_gate_faults.py::test_a_fault_in_a_repo_is_found'),
    ('a checkpoint may ask for any number of multiply-adds', 'hub/untrusted.py', ' and cost.macs <= MOST_MACS', '',
     'hub/test_untrusted.py::test_the_cost_of_an_image'),
    # training
    ('the last, smaller update counts less than the others', 'training/engine.py', 'loss / group, need_update',
     'loss / accumulation, need_update', 'test_train.py::test_accumulation_makes_updates_of_whole_groups'),
    ('the mode of clipping is not passed on', 'training/engine.py', 'value=args.clip_grad, mode=args.clip_mode)',
     'value=args.clip_grad)', 'test_train_flags.py::test_clipping_gets_its_limit_and_mode'),
    ('the model is validated where there is an average', 'training/checkpoint.py',
     'return (self.model if self.ema is None else self.ema.module).state_dict()', 'return self.model.state_dict()',
     'test_train.py::test_the_average_is_validated_and_saved'),
    ('a resumed run starts its average from the model', 'training/checkpoint.py',
     "checkpoint.get('state_dict_ema') or checkpoint['state_dict']", "checkpoint['state_dict']",
     'test_train.py::test_resuming_after_a_kill_is_exact'),
    ('the loss before a kill in an epoch is forgotten', 'training/checkpoint.py',
     "state['losses'] if batch else (0.0, 0)", '(0.0, 0)',
     'test_train.py::test_resuming_in_the_middle_of_an_epoch_is_exact'),
    ('a stream of random numbers gives the same ones each time', 'training/rng.py',
     '-> None:\n        self.state = random_state(self.device)\n', '-> None:\n',
     'test_train.py::test_random_stream_is_its_own'),
    ('adaptive clipping reaches what a variant adds', 'training/model.py', 'if parameter.data_ptr() not in added]',
     'if parameter.data_ptr() not in ()]', 'test_train.py::test_adaptive_clipping_leaves_what_a_variant_adds_alone'),
    ('validation crops as timm does by default', 'training/data.py',
     "        crop_pct=setup.data_config['crop_pct'],\n", '', 'test_train_flags.py::test_every_flag_reaches_its_place'),
    ('the summary keeps a row of an epoch that is trained again', 'training/checkpoint.py',
     "'summary.csv'), state.position.epoch)", "'summary.csv'), state.position.epoch + 1)",
     'test_train.py::test_resuming_in_the_middle_of_an_epoch_is_exact'),
    ('a resumed schedule starts its updates again', 'train.py',
     'scheduler.step_update(updates_done(args, state.position, len(train_loader)))', 'scheduler.step_update(0)',
     'test_train.py::test_resuming_in_the_middle_of_an_epoch_is_exact'),
)]
# fmt: on


def run_tests(folder: Path, selection: list[str]) -> tuple[bool, str]:
    """Run tests in a copy of the checkout; return whether they pass, and the first one that does not."""
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-n', '0', '-p', 'no:cacheprovider', '-rfE', *selection]
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    first = re.search(r'^(?:FAILED|ERROR) (.+?)(?: - |$)', done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 2) or (done.returncode and not first):
        raise SystemExit(f'{" ".join(command)}:\n{done.stdout}{done.stderr}')
    return done.returncode == 0, first[1] if first else ''


def main() -> None:
    """Run the tests on every fault that was asked for, and write the table of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-k', metavar='WORD', default='', help='only the faults with this in their name or file')
    word = parser.parse_args().k
    chosen = [mutation for mutation in MUTATIONS if word in mutation.name or word in mutation.file]
    if not chosen:
        parser.error(f'no fault has {word!r} in its name or file')
    rows = {}
    if RESULTS.exists():
        with open(RESULTS, newline='') as file:
            rows = {row['name']: row for row in csv.DictReader(file)}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='mutations-') as place:
        folder = Path(place)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, folder / name)
        # in one process, each test once
        passed, by = run_tests(folder, list(dict.fromkeys(test for mutation in chosen for test in mutation.selection)))
        if not passed:
            raise SystemExit(f'{by} fails without any fault')
        print(f'all tests pass without a fault, {time.monotonic() - start:.0f} s', flush=True)
        for mutation in chosen:
            path, begun = folder / mutation.path, time.monotonic()
            text = path.read_text()
            path.write_text(text.replace(mutation.old, mutation.new))
            passed, by = run_tests(folder, mutation.selection)
            path.write_text(text)
            rows[mutation.name] = dict(name=mutation.name, file=mutation.path, caught='no' if passed else 'yes', by=by)
            found = 'SURVIVED' if passed else 'caught'
            print(f'{found}: {mutation.name}: {by}, {time.monotonic() - begun:.0f} s', flush=True)
            with open(RESULTS, 'w', newline='') as file:
                writer = csv.DictWriter(file, ('name', 'file', 'caught', 'by'), lineterminator='\n')
                writer.writeheader()
                writer.writerows(rows[one.name] for one in MUTATIONS if one.name in rows)
    survived = [mutation.name for mutation in chosen if rows[mutation.name]['caught'] == 'no']
    print(f'{len(chosen) - len(survived)} of {len(chosen)} caught, {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
    main()
