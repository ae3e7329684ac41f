from hasten.serve.policy import StallFree
from hasten.testing.policy_kit import PolicyKit


class TestStallFree(PolicyKit):
    policy = StallFree(token_budget=16, max_num_seqs=6)
    token_budget = 16
    stall_free = True


class TestStallFreeWithAMinimalBudget(PolicyKit):
    policy = StallFree(token_budget=1, max_num_seqs=1)
    token_budget = 1
    stall_free = True
