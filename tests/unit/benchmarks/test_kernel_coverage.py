"""The choice of tests that launch every kernel."""

from scripts.gpu.kernel_coverage import choose_tests, entry_kernels, spread

TESTS = {
    "slow": {"kernels": ["a_kernel", "b_kernel"], "seconds": 9.0},
    "slower_a": {"kernels": ["a_kernel"], "seconds": 9.5},
    "quick_a": {"kernels": ["a_kernel"], "seconds": 1.0},
    "quicker_a": {"kernels": ["a_kernel"], "seconds": 0.5},
    "test_in_a_graph": {"kernels": ["c_kernel"], "seconds": 0.1},
}


def test_the_quickest_tests_of_each_kernel_are_chosen():
    chosen, missing = choose_tests(TESTS, {"a_kernel", "b_kernel"})
    assert chosen == ["quick_a", "quicker_a", "slow"]
    assert not missing


def test_kernels_without_a_fit_test_are_named():
    assert choose_tests(TESTS, {"c_kernel", "d_kernel"}) == ([], {"c_kernel", "d_kernel"})


def test_cases_are_spread_from_the_first_to_the_last():
    assert spread(range(11), 3) == [0, 5, 10]
    assert spread([1, 2], 3) == [1, 2]


def test_kernels_are_found_in_the_packages():
    kernels = entry_kernels()
    assert len(kernels) > 5
    assert all(name.endswith("_kernel") for name in kernels)
