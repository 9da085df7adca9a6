"""Held-out episodes, the comparison table, its video, and the Vicsek model that all swarms are measured against."""

import math

import imageio_ffmpeg
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

import envs


def literal(make_policy, env_id, num_episodes, seed, **env_kwargs):
    """[(statistics, rewards)] of the first episode of each environment, written down step by step."""
    world = envs.make_vec(env_id, num_episodes, 0, **env_kwargs)
    policy, episodes = make_policy(world), [[None, []] for _ in range(num_episodes)]
    observations, infos = world.reset(seed=seed)
    while any(stats is None for stats, _ in episodes):
        observations, rewards, _, _, infos = world.step(policy(observations, infos))
        for i, episode in enumerate(episodes):
            if episode[0] is None:
                episode[1].append(float(np.mean(rewards[i])))
                if "_episode" in infos and infos["_episode"][i]:
                    episode[0] = {name: values[i] for name, values in infos["episode"].items()}
    return episodes


@pytest.mark.parametrize(
    "env_id, env_kwargs",
    [("LunarLander", {"max_steps": 110}), ("Swarm", {"n_agents": 3, "max_steps": 7}), ("CartPole-v1", {})],
)
def test_an_evaluation_is_of_the_first_episode_of_each_environment_and_of_nothing_after_it(env_id, env_kwargs):
    stats, rewards, frames = envs.evaluate(envs.random_policy, env_id, 12, 5, **env_kwargs)
    expected = literal(envs.random_policy, env_id, 12, 5, **env_kwargs)
    lengths = [len(steps) for _, steps in expected]
    assert rewards.shape == (max(lengths), 12) and frames == []
    assert env_id == "Swarm" or len(set(lengths)) > 3  # episodes that end early, and would begin anew
    for i, (own, steps) in enumerate(expected):
        assert {name: values[i] for name, values in stats.items()} == own
        np.testing.assert_allclose(rewards[: len(steps), i], steps, rtol=1e-6)
        assert np.isnan(rewards[len(steps) :, i]).all()
        assert stats["l"][i] == len(steps) and np.nansum(rewards[:, i]) == pytest.approx(stats["r"][i], abs=1e-3)


def test_the_table_holds_mean_and_deviation_over_the_episodes_of_each_policy():
    idle = {"idle": lambda world: lambda observations, infos: np.zeros(len(observations), int)}
    scores, lines = envs.compare(idle, "LunarLander", 9, 3, max_steps=150)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    head, _, *rows = rows
    assert head[:4] == ["policy", "return", "length", "reward per step"] and "crashed" in head
    assert [row[0] for row in rows] == ["idle", "heuristic", "random"] and all(len(row) == len(head) for row in rows)
    for row, make_policy in zip(rows, (idle["idle"], envs.heuristic_policy, envs.random_policy), strict=True):
        episodes = [stats for stats, _ in literal(make_policy, "LunarLander", 9, 3, max_steps=150)]
        columns = {"return": [e["r"] for e in episodes], "length": [e["l"] for e in episodes]}
        columns |= {"reward per step": [e["r"] / e["l"] for e in episodes]}
        columns |= {name: [e[name] for e in episodes] for name in head[4:]}
        assert scores[row[0]] == pytest.approx(np.mean(columns["return"]))
        for name, cell in zip(head[1:], row[1:], strict=True):
            assert cell == f"{np.mean(columns[name]):.3f} +- {np.std(columns[name]):.3f}", name


def test_an_argument_of_the_environment_may_be_called_as_one_of_the_evaluations_own(tmp_path, monkeypatch):
    class Named(envs.Swarm):
        def __init__(self, num_envs=1, seed=0, path=0, render_mode=None, first_env=0):
            super().__init__(num_envs, n_agents=2, max_steps=seed + path, render_mode=render_mode, first_env=first_env)

    monkeypatch.setitem(envs.NATIVE_ENVS, "Named", Named)
    assert envs.evaluate(envs.random_policy, "Named", 1, 0, seed=3, path=2)[0]["l"] == [5]
    assert "5.000 +- 0.000" in envs.compare({}, "Named", 1, 0, seed=3, path=2)[1]
    envs.record(envs.random_policy, "Named", 0, tmp_path / "named.mp4", seed=3, path=2)
    assert len(video(tmp_path / "named.mp4")) == 5


def video(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.array([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]).astype(int)


def test_in_a_video_one_that_ends_early_stands_still_until_the_last_has_ended(tmp_path):
    shades = {"short": [250, 128, 20], "long": [20, 90, 128, 170, 250, 60, 200]}
    videos = {name: [np.full((64, 64, 3), shade, np.uint8) for shade in steps] for name, steps in shades.items()}
    envs.write_video(videos, str(tmp_path / "both.mp4"), fps=5)
    frames = video(tmp_path / "both.mp4")
    assert frames.shape == (7, 96, 128, 3)
    middle = frames[:, 48:80, [32, 96]].mean(axis=(1, 3))  # (frames, 2)
    np.testing.assert_allclose(middle[:, 0], [250, 128] + [20] * 5, atol=6)
    np.testing.assert_allclose(middle[:, 1], shades["long"], atol=6)


def test_a_recording_is_as_long_and_as_fast_as_its_episode(tmp_path):
    envs.record(envs.random_policy, "Swarm", 0, tmp_path / "12.mp4", n_agents=2, max_steps=9)
    shown = next(imageio_ffmpeg.read_frames(str(tmp_path / "12.mp4")))
    assert len(video(tmp_path / "12.mp4")) == 9 and shown["fps"] == envs.Swarm.metadata["render_fps"]


def test_where_nothing_is_drawn_there_is_no_recording_and_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CartPoleEnv, "metadata", {"render_modes": []})
    envs.record(envs.random_policy, "CartPole-v1", 0, tmp_path / "unseen.mp4")
    assert capsys.readouterr().out == "no unseen.mp4: CartPole-v1 draws no pictures\n"
    assert not (tmp_path / "unseen.mp4").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Vicsek
# ----------------------------------------------------------------------------------------------------------------------


def turns(position, heading, rule=envs.vicsek_policy, **policy):
    """The turns [rad] of the agents of one swarm in a box of side 10 that see to 1.5."""
    n_agents = len(heading)
    found = []
    for steering in ("turn", "push"):
        kwargs = dict(n_agents=n_agents, box_size=10.0, n_neighbors=max(1, n_agents - 1), steering=steering)
        world = envs.make_vec("Swarm", 1, 0, **kwargs)
        start = world.reset(seed=0, options={"position": [position], "heading": [heading]})
        found.append(rule(world, **policy)(*start)[0])
    np.testing.assert_allclose(np.angle(1 + 2 * (found[1][:, 0] + 1j * found[1][:, 1])), found[0][:, 0], atol=1e-6)
    return found[0][:, 0]


def test_two_agents_turn_to_the_mean_of_their_headings():
    np.testing.assert_allclose(turns([[5, 5], [5, 6]], [0, math.pi / 2]), [math.pi / 4, -math.pi / 4], atol=1e-6)
    np.testing.assert_allclose(turns([[5, 5], [5, 6]], [3.0, -3.0]), [math.pi - 3, 3 - math.pi], atol=1e-6)


def test_an_agent_turns_to_the_mean_of_all_within_the_radius_itself_among_them():
    rng = np.random.default_rng(0)
    position, heading = rng.uniform(0, 10, (60, 2)), rng.uniform(-math.pi, math.pi, 60)
    offset = (position[:, None] - position + 5) % 10 - 5  # (60, 60, 2)
    for radius in (None, 1.0, 0.4):
        near = np.hypot(*np.moveaxis(offset, -1, 0)) <= (radius or 1.5)  # (60, 60), oneself among them
        mean = np.arctan2(near @ np.sin(heading), near @ np.cos(heading))
        expected = (mean - heading + math.pi) % (2 * math.pi) - math.pi
        np.testing.assert_allclose(turns(position, heading, radius=radius), expected, atol=1e-5)
        assert near.sum(axis=1).max() > 2


def test_its_noise_is_uniform_and_as_wide_as_it_says_and_drawn_by_its_seed():
    found = [turns([[5, 5], [5, 8]], [0.5, -2], noise=0.6, seed=seed) for seed in range(500)]  # alone, each of them
    assert np.abs(found).max() <= 0.3 and np.mean(found) == pytest.approx(0, abs=0.02)
    assert np.var(found) == pytest.approx(0.6**2 / 12, rel=0.1)
    assert np.array_equal(found[7], turns([[5, 5], [5, 8]], [0.5, -2], noise=0.6, seed=7))


def test_it_turns_no_further_than_its_swarm_can():
    world = envs.make_vec("Swarm", 1, 0, n_agents=2, max_turn=0.2, steering="turn")
    start = world.reset(seed=0, options={"position": [[[1, 1], [1, 1.5]]], "heading": [[0, 3]]})
    found = envs.vicsek_policy(world)(*start)
    np.testing.assert_allclose(found[0, :, 0], [0.2, -0.2], atol=1e-6)
    assert found.dtype == np.float32 and world.action_space.contains(found)


def test_as_a_baseline_it_sees_more_neighbours_in_the_same_world():
    rules = envs.baselines("Swarm", n_agents=30, box_size=8.0)
    assert list(rules) == ["boids", "vicsek", "random"]
    make_policy, env_kwargs = rules["vicsek"]
    plain = rules["random"][1]
    assert make_policy is envs.vicsek_policy and plain == rules["boids"][1] == dict(n_agents=30, box_size=8.0)
    assert env_kwargs == plain | dict(n_neighbors=29)
    assert envs.baselines("Swarm", n_agents=1)["vicsek"][1]["n_neighbors"] == 1
    assert envs.baselines("Swarm", n_agents=500)["vicsek"][1]["n_neighbors"] == 40
    runs = []
    for kwargs in (env_kwargs, plain):
        world = envs.make_vec("Swarm", 2, 0, **kwargs)
        world.reset(seed=4)
        steps = [world.step(np.full((2, 30, 2), 0.1, np.float32))[1] for _ in range(10)]
        runs.append((np.array(steps), world.get_state()["position"]))
    for one, other in zip(*runs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Boids
# ----------------------------------------------------------------------------------------------------------------------


def test_boids_turn_to_their_rule_worked_out_from_where_everybody_is():
    rng = np.random.default_rng(1)
    position, heading = rng.uniform(0, 10, (60, 2)), rng.uniform(-math.pi, math.pi, 60)
    for own, align, cohesion, keep in ((0.3, 0.5, 12.0, 0.1), (1.0, 2.0, 6.0, 0.4), (1.0, 0.0, 0.0, 0.0)):
        expected = []
        for i in range(60):
            offset = (position - position[i] + 5) % 10 - 5
            near = [j for j in range(60) if j != i and math.hypot(*offset[j]) <= 1.5]
            wish = own * np.exp(1j * heading[i])  # as complex numbers, in the frame of the world
            if near:
                wish += align * np.exp(1j * heading[near]).mean()
                centre = complex(*offset[near].mean(axis=0)) / 1.5
                wish += cohesion * max(abs(centre) - keep, 0.0) * centre / abs(centre)
            expected.append(np.angle(wish * np.exp(-1j * heading[i])))
        rule = dict(own=own, align=align, cohesion=cohesion, keep=keep)
        np.testing.assert_allclose(turns(position, heading, envs.boids_policy, **rule), expected, atol=1e-4)


def test_boids_alone_or_all_in_one_place_fly_straight_on():
    np.testing.assert_allclose(turns([[5, 5]], [1.0], envs.boids_policy), [0], atol=1e-6)
    np.testing.assert_allclose(turns([[5, 5]] * 3, [1.0] * 3, envs.boids_policy), [0] * 3, atol=1e-6)
