"""Words every room shares: names, errors, digests, job specs, the mailbox layout. No networking; no I/O but what a
test asks of a failpoint."""
