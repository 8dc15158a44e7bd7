"""A model, and a folder of runs, over HTTP: on this machine only, unless a host and a token say more.

tunesmith serve    serve.py ──► api.py (request.py reads what is asked) ──► deliver/answer.py
tunesmith studio   studio.py ─► board.py ──► run_folder.py (what a run's files say), launch.py (starts and stops one)
both               access.py (where to listen, who may ask), app.py (JSON and errors), pages/ (what a browser shows)
"""
