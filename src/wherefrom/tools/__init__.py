"""What is built on the library as a user would build on it: evaluation, actions, reports, the command line, a demo."""
