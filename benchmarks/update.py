"""What two ways of computing an update buy, each beside the plain one in turn. From the repository's root, two minutes:

    python benchmarks/update.py

1. All weights of a network as views of one vector (`flatten`), so that clipping and Adam are one operation each, beside
   plain `agent.parameters()`: forward, backward, clipping and Adam of one minibatch of a script's default command.
2. ppo_swarm_lstm.py's stretches between the starts of episodes, torch's LSTM called once for each, beside one call for
   every step, which is what a reset inside a loop over steps would do: forward and backward of one minibatch.

One thread. Medians of the ratio over rounds, with the smallest and the largest.
"""

import time

import numpy as np
import torch
import torch.nn as nn
from common import median_and_range, print_head, print_row

import async_ppo
import envs
import grpo_perep
import ppo_swarm
import ppo_swarm_lstm

ROUNDS = 9
SECONDS = 1.0  # of a contestant in a round


def rate(step):
    """Calls of `step` in a second."""
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < SECONDS:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def ratios(one, other):
    """How many times as fast `one` is as `other`, in each round."""
    one()
    other()
    return [rate(one) / rate(other) for _ in range(ROUNDS)]


def make_agent(module, env_id):
    args = module.Args(env_id=env_id)
    kwargs = {"n_agents": args.n_agents} if hasattr(args, "n_agents") else {}
    return module.Agent(args, envs.make_vec(env_id, 1, 0, **kwargs)), args


def make_step(agent, inputs, flat):
    """Forward, backward, clipping and Adam of one minibatch."""
    parameters = [envs.flatten(agent)] if flat else list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, fused=True)

    def step():
        policy = agent.get_policy(*inputs)
        loss = policy.log_prob(policy.mode.detach()).mean()
        if hasattr(agent, "critic"):
            loss = loss + (agent.get_value(*inputs) ** 2).mean()
        if flat:
            parameters[0].grad.zero_()
        else:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    return step


def compare_weights():
    print("\nAll weights in one vector, times as fast as plain parameters\n")
    print_head("script", "rows in a minibatch", "ratio")
    for module, env_id in ((ppo_swarm, "Swarm"), (grpo_perep, "DenseLunarLander"), (async_ppo, "CartPole-v1")):
        _, args = make_agent(module, env_id)
        num_envs = args.num_envs if hasattr(args, "num_envs") else args.num_groups * args.group_size
        rows = args.num_steps * num_envs // args.num_minibatches
        inputs = [torch.randn(rows, *envs.make_vec(env_id, 1, 0).single_observation_space.shape)]
        if module is ppo_swarm:
            inputs.append(torch.zeros((rows, args.n_agents, 0), dtype=torch.int64))  # neighbours, which mlp ignores
        steps = [make_step(make_agent(module, env_id)[0], inputs, flat) for flat in (True, False)]
        print_row(f"{module.__name__}.py", rows, median_and_range(ratios(*steps), 2))


def compare_stretches():
    print("\nOne call of the LSTM for each stretch, times as fast as one for each step\n")
    print_head("sequences", "steps", "starts among them", "ratio")
    agent, args = make_agent(ppo_swarm_lstm, "LidarNavigation")
    trunk = agent.actor
    obs_dim = trunk.embed.weight.shape[-1]
    rng = np.random.default_rng(0)
    for num_envs in (args.num_envs // args.num_minibatches, args.num_envs):
        obs = torch.randn(num_envs, args.num_steps, args.n_agents, obs_dim)
        neighbors = torch.zeros((num_envs, args.num_steps, args.n_agents, 0), dtype=torch.int64)
        state = torch.zeros(num_envs, args.n_agents, 2, args.hidden_dim)
        every = torch.ones(num_envs, args.num_steps)

        def step(starts, obs=obs, neighbors=neighbors, state=state):
            trunk(obs, neighbors, starts, state)[0].sum().backward()

        for count in (0, 2, 8):
            starts = torch.zeros(num_envs, args.num_steps)
            starts[0, rng.choice(args.num_steps, count, replace=False)] = 1
            found = ratios(lambda starts=starts: step(starts), lambda every=every: step(every))
            print_row(num_envs * args.n_agents, args.num_steps, count, median_and_range(found, 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_weights()
    compare_stretches()
