"""What tests of several rooms share: servers to start, links to cut, facts to wait for."""
