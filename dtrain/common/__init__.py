"""Words every room shares: names, errors, digests, job specs, the mailbox layout. No I/O, no networking."""
