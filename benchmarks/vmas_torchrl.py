"""How fast TorchRL learns VMAS navigation, in the setting of its multi-agent PPO tutorial. About three minutes:

    pip install vmas==1.5.2 torchrl==0.14.1 tensordict==0.14.3
    python benchmarks/vmas_torchrl.py [--seconds 180] [--seed 0] [--threads 2]

3 agents, 60 environments x 100 steps in an iteration, a shared policy and a central critic of 2 x 256 tanh, 30 epochs
of minibatches of 400, and the tutorial's learning rate, gamma, lambda, clipping, entropy and gradient norm: MAPPO on
TorchRL's own collector, replay buffer, GAE and loss. One line per iteration: wall seconds of training so far (imports,
construction and the first reset are left out), team steps, and the mean return of the episodes that ended in it, under
the policy that collects, as the tutorial reports it: the sum of an agent's rewards, mean over agents and episodes.
VmasNavigation's "r" is the same quantity.
"""

import argparse
import sys
import time

import torch

try:
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
    from torchrl.envs import RewardSum, TransformedEnv, VmasEnv
    from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
    from torchrl.objectives import ClipPPOLoss, ValueEstimators
except ImportError as error:
    sys.exit(f"{error}: pip install vmas==1.5.2 torchrl==0.14.1 tensordict==0.14.3")

AGENTS = 3
ENVS = 60
STEPS = 100
EPOCHS = 30
MINIBATCH = 400


def make_env(seed):
    env = VmasEnv("navigation", num_envs=ENVS, max_steps=STEPS, n_agents=AGENTS, continuous_actions=True, seed=seed)
    return TransformedEnv(env, RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")]))


def make_networks(env):
    n_obs = env.observation_spec["agents", "observation"].shape[-1]
    n_actions = env.full_action_spec[env.action_key].shape[-1]
    bounds = env.full_action_spec_unbatched[env.action_key].space
    shape = dict(n_agents=AGENTS, n_agent_inputs=n_obs, share_params=True, depth=2, num_cells=256)
    actor = torch.nn.Sequential(
        MultiAgentMLP(**shape, n_agent_outputs=2 * n_actions, centralized=False), NormalParamExtractor()
    )
    parameters = [("agents", "loc"), ("agents", "scale")]
    policy = ProbabilisticActor(
        TensorDictModule(actor, in_keys=[("agents", "observation")], out_keys=parameters),
        spec=env.full_action_spec_unbatched,
        in_keys=parameters,
        out_keys=[env.action_key],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": bounds.low, "high": bounds.high},
        return_log_prob=True,
    )
    critic = TensorDictModule(
        MultiAgentMLP(**shape, n_agent_outputs=1, centralized=True),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    return policy, critic


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_env(args.seed)
    policy, critic = make_networks(env)
    collector = Collector(
        env, policy, frames_per_batch=ENVS * STEPS, total_frames=-1, auto_register_policy_transforms=False
    )
    storage = LazyTensorStorage(ENVS * STEPS)
    buffer = ReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement(), batch_size=MINIBATCH)
    loss = ClipPPOLoss(policy, critic, clip_epsilon=0.2, entropy_coeff=1e-4, normalize_advantage=False)
    done_keys = {name: ("agents", name) for name in ("done", "terminated")}
    loss.set_keys(reward=env.reward_key, action=env.action_key, value=("agents", "state_value"), **done_keys)
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.99, lmbda=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)

    print("seconds  team steps  episode return")
    start = time.perf_counter()
    steps = 0
    for batch in collector:
        steps += batch.numel()
        for name, key in done_keys.items():  # what ends a team's episode ends that of each of its agents
            ended = batch["next", name].unsqueeze(-1).expand(batch["next", *env.reward_key].shape)
            batch["next", *key] = ended
        with torch.no_grad():
            loss.value_estimator(
                batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        buffer.extend(batch.reshape(-1))
        for _ in range(EPOCHS * (ENVS * STEPS // MINIBATCH)):
            terms = loss(buffer.sample())
            total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
            optimizer.step()
        collector.update_policy_weights_()
        elapsed = time.perf_counter() - start
        returns = batch["next", "agents", "episode_reward"][batch["next", "agents", "done"]]
        print(f"{elapsed:7.1f}  {steps:10,}  {returns.mean():14.3f}", flush=True)
        if elapsed > args.seconds:
            break
    collector.shutdown()


if __name__ == "__main__":
    main()
