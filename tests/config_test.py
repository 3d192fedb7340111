from configs import config


def test_every_level_has_its_actors_in_turn():
    levels = config('/nowhere', level_names=('a', 'b', 'c'), num_actors=7).level_ids
    assert levels == [0, 1, 2, 0, 1, 2, 0]
