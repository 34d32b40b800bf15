"""The programs: each is a console script (coe-pretrain, ...) and a file of launch/, which call its `main`."""
