"""Names of levels: which package defines one, and which level a wrong name may have meant."""

import contextlib
import difflib
import importlib
import re

from impala.errors import LevelError

DMLAB30_LEVELS = frozenset(
    {
        'rooms_collect_good_objects_train',
        'rooms_collect_good_objects_test',
        'rooms_exploit_deferred_effects_train',
        'rooms_exploit_deferred_effects_test',
        'rooms_select_nonmatching_object',
        'rooms_watermaze',
        'rooms_keys_doors_puzzle',
        'language_select_described_object',
        'language_select_located_object',
        'language_execute_random_task',
        'language_answer_quantitative_question',
        'lasertag_one_opponent_small',
        'lasertag_three_opponents_small',
        'lasertag_one_opponent_large',
        'lasertag_three_opponents_large',
        'natlab_fixed_large_map',
        'natlab_varying_map_regrowth',
        'natlab_varying_map_randomized',
        'skymaze_irreversible_path_hard',
        'skymaze_irreversible_path_varied',
        'psychlab_arbitrary_visuomotor_mapping',
        'psychlab_continuous_recognition',
        'psychlab_sequential_comparison',
        'psychlab_visual_search',
        'explore_object_locations_small',
        'explore_object_locations_large',
        'explore_obstructed_goals_small',
        'explore_obstructed_goals_large',
        'explore_goal_locations_small',
        'explore_goal_locations_large',
        'explore_object_rewards_few',
        'explore_object_rewards_many',
    }
)


def is_gymnasium_id(level_name: str) -> bool:
    """Returns whether a name ends with a version, as all ids of Gymnasium's own do."""
    return re.search(r'-v\d+$', level_name) is not None


def import_registrations(level_name: str) -> None:
    """Imports the package that registers an id with Gymnasium, as far as its prefix tells.

    Raises:
      LevelError: the package cannot be imported.
    """
    if level_name.startswith('Vizdoom'):
        module, extra = 'vizdoom.gymnasium_wrapper', 'vizdoom'
    elif level_name.startswith(('MiniGrid', 'BabyAI')):
        module, extra = 'minigrid', 'minigrid'
    else:
        # The older ids of Atari games have no prefix of their own.
        module, extra = 'ale_py', ''
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise missing_package(level_name, module.partition('.')[0], error, extra) from error


def missing_package(
    level_name: str, package: str, error: BaseException, extra: str = ''
) -> LevelError:
    """Returns the error of a level whose package cannot be imported.

    Args:
      level_name: of the level.
      package: name of the package.
      error: of the import.
      extra: of this project, that installs the package; '' for ale-py, which comes with it.
    """
    install = f"pip install -e '.[{extra}]'" if extra else 'pip install ale-py'
    return LevelError(
        f'{level_name!r} needs the package {package}, which cannot be imported ({error}): '
        f'{install}.'
    )


def suggestion(level_name: str, module: str = '') -> str:
    """Returns a question such as " Did you mean 'CartPole-v1'?", or '' if no name is similar.

    Args:
      level_name: without the module that registers it.
      module: that module with a colon; it precedes the suggested name.

    Raises:
      LevelError: the name is an id without its version.
    """
    import gymnasium

    for prefix in ('', 'Vizdoom', 'MiniGrid'):
        with contextlib.suppress(LevelError):
            import_registrations(prefix)
    # People often leave out prefix and version: 'Pong' for 'ALE/Pong-v5'.
    names: dict[str, str] = {}
    for known in [*gymnasium.registry, *sorted(DMLAB30_LEVELS)]:
        if known == level_name:
            return ''
        names[known.lower()] = known
        names[re.sub(r'^ALE/|-v\d+$', '', known).lower()] = known
    known = names.get(level_name.lower(), '')
    if is_gymnasium_id(known) and not is_gymnasium_id(level_name):
        raise LevelError(
            f'{level_name!r} lacks the version of a Gymnasium id: did you mean {known!r}?'
        )
    close = difflib.get_close_matches(level_name.lower(), names, n=1, cutoff=0.75)
    return f' Did you mean {module + names[close[0]]!r}?' if close else ''
