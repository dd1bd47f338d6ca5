"""What several tests share, one module per topic. Fixtures stay in the `conftest.py` of the tests that use them."""
