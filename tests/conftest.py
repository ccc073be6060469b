"""Puts this folder on the path (`from support.helpers import ...`), keeps torch to one thread, and stops the clock."""

import gc
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_freezecache.distributed import Announcer

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
# What only a bug raises is never survived in tests: not under the default settings either.
Announcer.raises = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)


#: Tests of many cases that take seconds each: of these, the first case and every third one belong to the quick suite,
#: the others to the slow one. Another change of the code rarely breaks one of these cases alone.
MANY_CASES = {
    "invariant/test_writing_epochs.py": (
        "test_resumed_is_uninterrupted",
        "test_finished_store_is_the_upfront_one",
        "test_write_through_of_exact_features_is_upfront_training",
    ),
    "invariant/test_augmentation.py": (
        "test_resumed_with_random_transform_is_uninterrupted",
        "test_replayed_view_is_prefix_of_the_view",
    ),
    "invariant/test_equal_trajectories.py": ("test_resumed_is_uninterrupted",),
    "invariant/test_packed_rows.py": ("test_training_on_packed_rows_is_the_same_bit_for_bit",),
    "hub/test_trainer_pushes.py": ("test_feature_store_is_never_uploaded",),
    "hub/test_pushing.py": ("test_refused_push_says_why_and_loses_nothing", "test_passing_errors_are_tried_again"),
    "hub/test_heads_of_trainings.py": ("test_head_of_a_replayed_training_is_the_trained_model",),
    "training/test_store_provider_views.py": ("test_geometry_is_kept_in_the_smallest_way_that_fits",),
    "build/test_deepening.py": ("test_deepening_a_lossless_store_gives_the_bytes_of_a_build_from_images",),
    "build/test_sizing.py": ("test_estimated_bytes_are_those_of_the_files",),
    "build/test_comparison.py": ("test_rows_that_a_build_would_write_again_do_not_differ",),
    "faults/test_stores_lost_in_training.py": (
        "test_training_resumed_in_the_epoch_of_a_loss_is_the_uninterrupted_one",
    ),
    "training/test_rehearsal.py": ("test_under_the_defaults_it_trains_on_images_as_without_a_cache",),
    "training/test_sentinels.py": ("test_a_change_after_the_build_ends_the_replay_and_nothing_is_trained_wrongly",),
    "training/test_store_provider.py": ("test_resume_of_a_deepened_store_is_exact_even_if_all_stores_are_gone",),
    "training/test_freezing_trial.py": ("test_the_training_is_that_of_the_schedule_that_was_chosen",),
    "test_transformers_texts.py": ("test_cached_training_of_an_example_is_the_frozen_one",),
    "test_trainer_texts.py": (
        "test_training_on_features_is_close_to_the_frozen_one_where_batches_are_padded_to_their_longest",
        "test_codecs_of_tokens",
        "test_training_on_features_is_the_frozen_one_where_batches_have_one_width",
    ),
    "test_trainer_models.py": ("test_training_on_features_is_the_frozen_training_on_samples",),
    "test_trainer_wrappers.py": (
        "test_model_that_accelerate_has_hooked_is_right",
        "test_compiled_model_whose_blocks_are_found_is_right",
        "test_channels_last_is_right",
        "test_activation_checkpointing_of_found_blocks_changes_nothing",
        "test_attention_implementations_of_found_blocks_are_right",
    ),
    "test_trainer_plain.py": ("test_compiled_model_trains_as_the_uncompiled_one",),
    "test_trainer_learning_rates.py": ("test_resumed_is_uninterrupted",),
    "test_trainer_adapters.py": ("test_adapters_before_and_behind_the_cut_are_right",),
    "test_trainer_selections.py": ("test_folds_cost_one_build",),
    "test_trainer_sizes.py": (
        "test_sizes_that_are_not_those_of_samples_are_refused_before_the_first_step",
        "test_defaults_and_trials_take_images_of_several_sizes",
        "test_codecs_of_features_of_several_sizes",
    ),
    "test_trainer_widths.py": (
        "test_texts_whose_padding_counts_are_trimmed_to_the_width_of_a_batch",
        "test_codecs_of_trimmed_features",
        "test_ways_to_train_on_trimmed_features",
        "test_training_is_the_frozen_one_bit_for_bit_where_batches_are_as_wide_as_the_widest",
    ),
}


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items):
    """Marks cases of tests with many of them as slow."""
    tests, seen = Path(__file__).parent, {}
    for item in items:
        path, name = item.path.relative_to(tests).as_posix(), getattr(item, "originalname", item.name)
        if name in MANY_CASES.get(path, ()):
            case = seen[path, name] = seen.get((path, name), -1) + 1
            if case % 3:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session):
    """Takes what was imported out of garbage collection: each training begins with one, a third of a second long."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()  # libraries report what is not collected when the interpreter ends


@pytest.fixture
def clock(monkeypatch):
    """Stops the clock that the package measures with; `clock(seconds)` moves it on."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance
