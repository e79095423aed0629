"""Run folder in, deployment artifact out: a library without command line or server."""
